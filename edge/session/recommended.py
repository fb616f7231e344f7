"""What the files of a model recommend of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.errors import InputError, brief
from edge.session.sampler import SamplingOptions

__all__ = ["FIELDS", "recommended"]

_PREFIX = "general.sampling."  # of the keys of a GGUF file; generation_config.json has none

#: Name of a recommendation, in a GGUF file or in generation_config.json -> the field that it sets.
FIELDS = {
    "temp": "temperature",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "repetition_penalty": "repetition_penalty",
    "penalty_last_n": "penalty_window",
}
#: Names of what is not built -> the values with which it changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "sequence": (),
    "xtc_probability": (0,),
}
#: Names of numbers that only count together with one that is not built.
_PARTS = ("mirostat_eta", "mirostat_tau", "xtc_threshold")


def recommended(values: Mapping[str, Any]) -> tuple[SamplingOptions, tuple[str, ...]]:
    """The options that a model's files recommend, and a line for each that cannot be followed.

    values: `Backend.recommended`, as the files have them. A value that is wrong, or asks for a
    sampler that is not built, is ignored: a model runs without its recommendations.
    """
    chosen, notes = dict[str, Any](), list[str]()
    for key, value in values.items():
        name = key.removeprefix(_PREFIX)
        if value is None or (name == key and name not in FIELDS):
            continue  # generation_config.json says much else
        if name in FIELDS:
            try:
                number = {FIELDS[name]: _shortest(value)}
                SamplingOptions(**number)
                chosen |= number
            except InputError as error:
                notes.append(f"{key} is ignored: {error}")
        elif name not in _PARTS and value not in _NEUTRAL.get(name, ()):
            notes.append(f"{key} is ignored: {brief(value, 40)} is not built")
    return SamplingOptions(**chosen), tuple(notes)


def _shortest(value: Any) -> Any:
    """A float32 as the number that was written: 0.6, not 0.6000000238."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
