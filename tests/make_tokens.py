"""Make data/llamacpp_tokens.json: what llama.cpp tokenises with the vocabularies of
test_tokenizer_files.py. Needs the package xllamacpp, which is llama.cpp, beside those of the tests:

    python tests/make_tokens.py
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp
from test_tokenizer_files import CASES, REFERENCE, texts_of


def write(path: Path, metadata: dict[str, Any]) -> None:
    """A llama of one layer with this vocabulary."""
    n, dim = len(metadata["tokenizer.ggml.tokens"]), 32
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(64)
    w.add_embedding_length(dim)
    w.add_block_count(1)
    w.add_feed_forward_length(dim)
    w.add_head_count(1)
    w.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            w.add_array(key, value)
        elif isinstance(value, bool):
            w.add_bool(key, value)
        elif isinstance(value, int):
            w.add_uint32(key, value)
        else:
            w.add_string(key, value)
    for name in ("token_embd", "output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        shape = (n, dim) if name == "token_embd" else (dim,)
        w.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        w.add_tensor(f"blk.0.{name}.weight", np.ones((dim, dim), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def ask(server: Any, text: str, special: bool) -> list[int]:
    """The tokens of a text."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": special}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, metadata in CASES.items():
            path = Path(folder, "model.gguf")
            write(path, metadata)
            params = xllamacpp.CommonParams()
            params.model.path, params.n_ctx, params.warmup = str(path), 64, False
            server = xllamacpp.Server(params)
            found[name] = [
                [ask(server, text, special) for special in (False, True)] for text in texts_of(name)
            ]
    REFERENCE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
