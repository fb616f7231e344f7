#!/bin/sh
# edge in Termux, on an Android phone: sh termux.sh ["QUESTION" [MODEL.gguf]]
#
# Installs what is missing, then asks a model: the small default one, or yours. EDGE_WHEEL names the
# wheel to install, edge_run-...-android_21_arm64_v8a.whl: docs/wheels.md says how to build it.
set -eu
question=${1:-Why is the sky blue?}
model=${2:-}

# Nobody has wheels of these two for Android, so they come as packages of Termux: tokenizers from
# its user repository. (Building it takes Rust and the better part of an hour.) cffi is not needed.
if ! python -c 'import numpy, tokenizers' 2>/dev/null; then
    pkg install -y python python-numpy tur-repo
    pkg install -y python-tokenizers
fi
command -v edge-run >/dev/null || pip install "${EDGE_WHEEL:?set it to the file of edge's wheel for Android}"

# Android puts the processor to sleep with the screen; this lasts until the script ends.
if command -v termux-wake-lock >/dev/null; then
    termux-wake-lock
    trap termux-wake-unlock EXIT
fi

# Keep models in Termux's own storage: from the shared one (/sdcard) they are mapped slowly.
[ -n "$model" ] || edge-run pull
# A budget of its own, because Android ends the app that takes too much; the rest is chosen.
edge-run chat ${model:+"$model"} --memory "${EDGE_MEMORY:-2GB}" --max-tokens 256 -p "$question"
