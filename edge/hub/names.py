"""Short names of models, and where each is: the one table of them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NAMES", "Place"]


class Place(NamedTuple):
    """A repository, and the type that is recommended for a small device."""

    repo: str
    type: str


#: Name -> its place. The types of the smallest models have 8 bits: fewer cost them too much.
NAMES = {
    "smollm2": Place("HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF", "Q4_K_M"),
    "smollm2-135m": Place("bartowski/SmolLM2-135M-Instruct-GGUF", "Q8_0"),
    "smollm3-3b": Place("ggml-org/SmolLM3-3B-GGUF", "Q4_K_M"),
    "qwen2.5-0.5b": Place("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "Q8_0"),
    "qwen2.5-coder-0.5b": Place("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "Q8_0"),
    "qwen2.5-coder-1.5b": Place("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "Q4_K_M"),
    "qwen3-0.6b": Place("Qwen/Qwen3-0.6B-GGUF", "Q8_0"),
    "gemma-3-270m": Place("ggml-org/gemma-3-270m-it-GGUF", "Q8_0"),
    "gemma-3-1b": Place("ggml-org/gemma-3-1b-it-GGUF", "Q4_K_M"),
    "phi-4-mini": Place("unsloth/Phi-4-mini-instruct-GGUF", "Q4_K_M"),
    "phi-4-mini-reasoning": Place("unsloth/Phi-4-mini-reasoning-GGUF", "Q4_K_M"),
}
