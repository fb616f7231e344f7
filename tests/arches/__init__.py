"""What the tests know of each architecture, one file each, found by its name as in `edge/models`.

A file says what is special about the tiny random models of its architecture, as llama.cpp's
converter would write them, and what model of `transformers` they are:

- `CASES`: name -> `Case`, what is compared with `transformers`.
- `tensors(t)`: GGUF name -> shape, or an array where any random numbers would not do.
- `metadata(t)`: keys beyond those of `common.metadata`, or with other values; None: not written.
- `CONFIG`: the configuration's class in `transformers`, or a function of t that names it.
  `config(t, m)`: its arguments beyond those of `common.hf_config`; m: all metadata, keys without
  the architecture's name.
- `NAMES`: tensors with a name in `transformers` that is not in `common.NAMES`. `PAIRED`: the
  converter reorders the rows of q and k so that neighbours are a pair. `PLUS_ONE`: it adds 1 to the
  weights of norms. `state(t, weights)`: all of this, where these three do not say it.
- `LARGEST`: options of the `Tiny` that has every tensor which the architecture knows. `SPARE`:
  those which may be absent, beyond biases and the usual ones.
- `SPREAD`: of the weights of norms.

All but `CASES`, `tensors` and `CONFIG` may be left out.

common   what the files share
experts  what those with experts share
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from arches.common import Case

_ALL = {
    module.name: importlib.import_module(f"arches.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name not in ("common", "experts")
}
#: Name -> what is compared with `transformers`, of all architectures.
CASES: dict[str, Case] = {name: case for arch in _ALL.values() for name, case in arch.CASES.items()}


def arch_of(name: str) -> ModuleType:
    """The file of an architecture."""
    return _ALL[name.replace("-", "_")]
