#!/bin/sh
# llama.cpp: a GGUF with a byte-level BPE vocabulary that names no eos token ends its answers at the
# first comma.
#
# `tokenizer.ggml.eos_token_id` is an optional key. Where a file leaves it out, llama.cpp takes 11 for
# vocabularies of the model "gpt2", and whatever token has that id then counts as an end of generation.
# GPT-2's vocabulary begins with the printable bytes, as those of SmolLM, Llama 3, Qwen and Phi-4 do:
# token 11 is ",". The end is reported as the model's own (stop type "eos"); the log warns that the
# "tokenizer config may be incorrect" and names neither the token nor the key.
#
# Seen: xllamacpp 2026.10.11549 (llama.cpp), gguf 0.17.1, Python 3.11, x86-64.
#   with the key:     ',bcde'  (stopped by the limit)
#   without the key:  ','      (stopped by "eos")
# Exits 0 while this is so.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    xllamacpp==2026.10.11549 gguf==0.17.1 numpy
cat >"$work/try.py" <<'PY'
import json
import sys
import urllib.request

import gguf
import numpy as np
import xllamacpp

printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
others = [b for b in range(256) if b not in printable]
tokens = [*map(chr, printable), *(chr(0x100 + i) for i in range(len(others)))]  # GPT-2's order
tokens += ["ab", "<|endoftext|>"]
END, DIM = len(tokens) - 1, 288
SAYS = "a,bcde"  # the model's next token depends on the last one alone


def write(path, with_key):
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(256)
    w.add_embedding_length(DIM)
    w.add_block_count(1)
    w.add_feed_forward_length(32)
    w.add_head_count(1)
    w.add_key_length(32)
    w.add_value_length(32)
    w.add_rope_dimension_count(32)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([1] * (len(tokens) - 1) + [3])
    w.add_token_merges(["a b"])
    if with_key:
        w.add_eos_token_id(END)
    one, none = np.ones, np.zeros
    w.add_tensor("token_embd.weight", np.eye(len(tokens), DIM, dtype=np.float32))
    head = none((len(tokens), DIM), np.float32)
    for here, there in zip(SAYS, SAYS[1:]):
        head[tokens.index(there), tokens.index(here)] = 1
    w.add_tensor("output.weight", head)
    w.add_tensor("output_norm.weight", one(DIM, np.float32))
    for name, shape in {
        "attn_q": (32, DIM),
        "attn_k": (32, DIM),
        "attn_v": (32, DIM),
        "attn_output": (DIM, 32),
        "ffn_gate": (32, DIM),
        "ffn_up": (32, DIM),
        "ffn_down": (DIM, 32),
    }.items():
        w.add_tensor(f"blk.0.{name}.weight", none(shape, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        w.add_tensor(f"blk.0.{name}.weight", one(DIM, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def answer(path):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = path, 256, False
    server = xllamacpp.Server(params)
    body = json.dumps({"prompt": "a", "n_predict": 5, "temperature": 0}).encode()
    request = urllib.request.Request(
        server.listening_address + "/completion", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        reply = json.load(reply)
    return reply["content"], reply["stop_type"]


seen = []
for with_key in (True, False):
    write(sys.argv[1], with_key)
    seen.append(answer(sys.argv[1]))
    print("with the key:   " if with_key else "without the key:", seen[-1], flush=True)
sys.exit(seen != [(",bcde", "limit"), (",", "eos")])
PY
"$work/venv/bin/python" "$work/try.py" "$work/model.gguf" 2>"$work/log" || {
    tail -n 20 "$work/log" >&2
    echo "not as it was" >&2
    exit 1
}
echo "still so"
