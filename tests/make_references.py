"""Regenerate tests/data/references/: logits of `transformers` for tiny random models.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 gguf libgguf
    python tests/make_references.py [ARCHITECTURE ... | lora]

The weights come from `tiny.tensors`, that is from numpy seeds, so the tests make the same model
without torch. Float32, CPU, one thread, eager attention: the same file every time. Each case twice:
`<case>` all in float32, `<case>.f16` with keys and values rounded to float16, as in the engine's
cache (which alone moves these logits by 2e-3). `lora`: logits of `peft` for models with adapters.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import arches
import lora
import numpy as np
from arches.common import Case, Tiny, hf_config, hf_state
from lora import Lora, peft_state
from tiny import metadata, tensors

DATA = Path(__file__).parent / "data" / "references"


def reference_of(case: str) -> dict[str, np.ndarray]:
    """What is kept of a case: "" -> (positions, vocab) logits in float32; ".f16" -> the same with a
    float16 cache.
    """
    with np.load(file_of(arches.CASES[case].model.arch)) as kept:
        return {kind: kept[case + kind] for kind in ("", ".f16")}


def file_of(arch: str) -> Path:
    """The file of an architecture."""
    return DATA / f"{arch}.npz"


def configured(t: Tiny) -> Any:
    """The model's configuration in transformers."""
    import transformers

    arch, prefix = arches.arch_of(t.arch), f"{t.arch}."
    m = {key.removeprefix(prefix): value for key, value in metadata(t).items()}
    common = hf_config(t, m, is_tied="output.weight" not in arch.tensors(t))
    own = arch.config(t, m) if hasattr(arch, "config") else {}
    name = arch.CONFIG(t) if callable(arch.CONFIG) else arch.CONFIG
    return getattr(transformers, name)(**common | own)


def state_of(t: Tiny) -> dict[str, np.ndarray]:
    """The model's weights as transformers names and orders them."""
    arch, weights = arches.arch_of(t.arch), tensors(t)
    if hasattr(arch, "state"):
        return arch.state(t, weights)
    return hf_state(
        t,
        weights,
        getattr(arch, "NAMES", {}),
        is_paired=getattr(arch, "PAIRED", False),
        is_plus_one=getattr(arch, "PLUS_ONE", False),
    )


def loaded(case: Case) -> Any:
    """The model of a case in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    configuration = configured(case.model)
    model = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32).eval()
    weights = {key: torch.from_numpy(w.copy()) for key, w in state_of(case.model).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if configuration.tie_word_embeddings else []
    assert list(missing) == tied and not unexpected, (missing, unexpected)
    if tied:
        model.tie_weights()
    return model


def adapted(case: Case, adapter: Lora) -> Any:
    """The model of a case with an adapter, by peft."""
    import torch
    from peft import LoraConfig, get_peft_model

    state = peft_state(case.model, adapter)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.factor * adapter.rank,
        target_modules=lora.names(case.model, adapter),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(loaded(case), config).eval()
    result = model.load_state_dict({k: torch.from_numpy(w.copy()) for k, w in state.items()}, False)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "lora_" in k]
    return model


def references(case: Case, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """(positions, vocab) logits by transformers: in float32, and with a float16 cache."""
    import torch
    from transformers import DynamicCache

    class HalfCache(DynamicCache):
        def update(self, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(key.half().float(), value.half().float(), *args, **kwargs)

    with torch.no_grad():
        exact, half = (
            model(torch.from_numpy(case.tokens)[None], past_key_values=cache).logits
            for cache in (DynamicCache(), HalfCache())
        )
    return exact[0, case.positions].numpy(), half[0, case.positions].numpy()


def main(*wanted: str) -> None:
    """Write the files of these architectures, and of adapters; none: of all."""
    import torch

    torch.set_num_threads(1)
    for arch in wanted or [*sorted({case.model.arch for case in arches.CASES.values()}), "lora"]:
        logits = {}
        if arch == "lora":
            for name, (case, adapter) in lora.CASES.items():
                _, logits[name] = references(case, adapted(case, adapter))
            np.savez_compressed(lora.REFERENCES, **logits)
            continue
        for name, case in arches.CASES.items():
            if case.model.arch == arch:
                logits[name], logits[f"{name}.f16"] = references(case, loaded(case))
        np.savez_compressed(file_of(arch), **logits)
        print(f"{arch}: {len(logits) // 2} cases, {file_of(arch).stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
