"""Every public option against values of wrong types: an InputError, before anything is read."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fake_model, says
from test_tokenizer import BPE

import edge
from edge import check, perplexity
from edge.engine.describe import pack
from edge.engine.engine import DescribedFile
from edge.errors import EdgeError, InputError
from edge.kv.cache import KVCache
from edge.loading import LoadOptions, NativeOptions, OnnxOptions
from edge.onnx.run.kv import GrowingCache
from edge.session.request import CallOptions, Request
from edge.session.sampler import SamplingOptions
from edge.template.template import ChatTemplate


class Broken:
    """Its repr fails."""

    def __repr__(self) -> str:
        raise ValueError("no")


class NoPath:
    """An os.PathLike that gives no path."""

    def __fspath__(self) -> Any:
        return 5


#: What a value could pass for: the kinds of options that take it.
VALUES: list[tuple[Any, str]] = [
    *((value, "text path") for value in ("4096", "0.7", "", "x", " 5 ", "2GB!", "\n" * 3)),
    *(("a\0b", "text"), ("\ud800", ""), ("x" * 100_000, "text path")),
    *((value, "number") for value in (4096.5, 1e300, Fraction(1, 3), np.float32(0.25))),
    *((value, "number") for value in (4096.0, np.float64(1.0))),
    *((value, "") for value in (float("nan"), float("inf"), np.float32("nan"))),
    (-float("inf"), "forbidden"),
    *((value, "whole number") for value in (1, 3, 2**40, np.int64(3), np.uint8(2))),
    *((value, "whole number") for value in (-1, 10**18, 2**64, 10**30, 10**5000, -(10**5000))),
    *((True, "flag"), (False, "flag"), (np.bool_(True), "flag"), (None, "none")),
    *((value, "path") for value in (b"x", Path("x"))),
    *((value, "") for value in (b"a\0b", bytearray(b"x"), 1j, Decimal("1"), Decimal("nan"))),
    *((value, "") for value in (object(), Broken(), NoPath(), ...)),
    *((value, "function") for value in (len, type, lambda *_: None)),
    *(([], "tools"), ([{}], "tools"), (({"name": "f"},), "tools")),
    *((value, "") for value in (["x", 5], [[]], [None], {1, 2}, {5: "x"})),
    ({"x": 1}, "names"),
    *((np.arange(3), "ids"), (np.array("x"), ""), (np.zeros((2, 2)), ""), (range(3), "ids")),
    *(((), "tools"), (iter([1]), ""), (SamplingOptions(), "sampling"), (Request(), "")),
]

#: Option -> the kinds of values that it may take (and may still refuse for their size).
LOADING = {
    **dict.fromkeys(("context", "threads"), "whole none"),
    **{
        "sessions": "whole",
        "layout": "",
        "kv": "",
        "fallback": "flag",
        "memory": "whole text none",
        "chat_template": "text none",
        "lora": "text path none tools",
        "model_sampling": "flag",
    },
    **{"prefix_cache": "path none", "ep": "text none", "soc": "text none"},
}
REQUEST = {
    **{"max_tokens": "whole none", "logprobs": "whole", "special": "flag", "reuse": "flag"},
    **{"stop": "text tools", "sampling": "sampling", "progress": "function none"},
    "variables": "names",
}
SAMPLING = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), "number none"),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), "number"),
    "repetition_penalty": "number none",
    **dict.fromkeys(("top_k", "penalty_window", "seed"), "whole none"),
    "logit_bias": "bias",
}


def session() -> edge.Session:
    """One that holds some tokens."""
    made = fake_model(says("one"))[0].session()
    made.generate("x")
    return made


def model() -> edge.Model:
    return fake_model(says("one"))[0]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that read or load something."""
    seen: list[str] = []

    def load(path: str, options: NativeOptions) -> Any:
        seen.append(path)
        raise EdgeError("read")

    monkeypatch.setattr(DescribedFile, "open", load)
    monkeypatch.setattr("edge.model.is_onnx", lambda path: False)
    return seen


def try_all(call: Callable[[Any], Any], kinds: str, where: str) -> None:
    """What is of no kind that the option takes must be an InputError of one line, soon; what is
    may be taken, or refused for what it says.
    """
    for value, kind in VALUES:
        began = time.perf_counter()
        may = set(kind.split()) & set(kinds.split())
        try:
            call(value)
            assert may, f"{where} took {check.brief(value)}"
        except InputError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 1000, text
        except EdgeError:
            assert may, f"{where} of {check.brief(value)} went on"
        assert time.perf_counter() - began < 5


def test_all_options_are_tried() -> None:
    fields = NativeOptions.__dataclass_fields__.keys() | OnnxOptions.__dataclass_fields__.keys()
    assert set(LOADING) == set(LoadOptions.__annotations__) == fields
    assert set(REQUEST) == set(CallOptions.__annotations__)
    assert set(SAMPLING) == set(SamplingOptions.__dataclass_fields__)


@pytest.mark.parametrize("name", LOADING)
def test_loading(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)

    def load(value: Any) -> None:
        seen.clear()
        try:
            edge.load("no.gguf", **{name: value})
        except InputError:
            assert name in ("ep", "fallback", "soc") or not seen
            raise

    try_all(load, LOADING[name], name)


def test_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    try_all(edge.load, "path none", "load")
    try_all(lambda value: edge.load("x", progress=value), "function none", "progress")
    try_all(lambda value: edge.resume(value, model()), "path", "resume")
    try_all(lambda value: edge.resume("x", value), "", "resume, model")
    try_all(lambda value: edge.resume("x", model(), autosave=value), "whole none", "autosave")
    try_all(lambda value: pack(value, "x"), "path", "pack")
    try_all(lambda value: pack("x", value), "path", "pack, target")
    try_all(lambda value: pack("x", "y", layout=value), "", "layout")
    try_all(lambda value: pack("x", "y", threads=value), "whole none", "threads")
    try_all(lambda value: pack("x", "y", progress=value), "function none", "progress")


@pytest.mark.parametrize("name", REQUEST)
def test_request(name: str) -> None:
    talk = session()
    kinds = REQUEST[name]
    try_all(lambda value: talk.stream("x", **{name: value}), kinds, name)
    try_all(lambda value: model().session(**{name: value}), kinds, name)
    try_all(lambda value: model().chat(**{name: value}), kinds, name)


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling(name: str) -> None:
    try_all(lambda value: SamplingOptions(**{name: value}), SAMPLING[name], name)
    if name == "logit_bias":
        try_all(
            lambda value: SamplingOptions(logit_bias={5: value}), "number whole forbidden", name
        )
        for value, kind in VALUES:
            if isinstance(value, Hashable) and kind in ("text", "number", "flag", "none", "path"):
                with pytest.raises(InputError, match="a token id in logit_bias"):
                    SamplingOptions(logit_bias={value: 1.0})


def test_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> None:
        raise EdgeError("a toy has no session files")

    monkeypatch.setattr("edge.session.journal.save", save)
    talk, chat = session(), model().chat()
    try_all(talk.stream, "text tools ids", "prompt")
    try_all(lambda value: talk.generate("x", stop=value), "text tools", "stop")
    try_all(talk.trim, "whole", "trim")
    try_all(session().keep, "whole none", "keep")
    try_all(chat.stream, "text", "message")
    try_all(lambda value: chat.stream({"role": value, "content": "x"}), "text", "role")
    for cache in (KVCache, GrowingCache):
        new = partial(cache, None, 256)
        try_all(lambda value: new(when_full=value), "", "when_full")  # noqa: B023
    try_all(lambda value: model().chat(value), "text none", "system")
    try_all(lambda value: model().chat(tools=value), "tools none", "tools")
    try_all(lambda value: model().chat(require_tools=value), "flag", "require_tools")
    for one in (talk, chat):
        try_all(one.save, "path", "save")
        try_all(one.autosave, "path", "autosave")
        try_all(lambda value: one.autosave("x", value), "whole", "every")  # noqa: B023


def test_tokenizer_and_template() -> None:
    try_all(BPE.encode, "text", "encode")
    try_all(lambda value: BPE.encode("x", special=value), "flag", "special")
    try_all(lambda value: BPE.encode("x", bos=value), "flag none", "bos")
    try_all(BPE.quote, "text", "quote")
    try_all(BPE.decode, "tools ids", "decode")
    try_all(lambda value: BPE.decode([1], special=value), "flag", "special")
    try_all(lambda value: BPE.decoder(special=value), "flag", "special")
    try_all(lambda value: BPE.decoder(after=value), "whole none", "after")
    for one in (BPE.decoder().push, BPE.token_bytes, BPE.token_text, BPE.is_special, BPE.is_added):
        try_all(one, "whole", one.__name__)
    template = ChatTemplate("{{ messages[0].content }}")
    messages = [{"role": "user", "content": "x"}]
    try_all(template.render, "", "messages")
    try_all(lambda value: template.render(messages, tools=value), "tools none", "tools")
    for value, kind in VALUES:
        if kind != "none" and not (isinstance(value, dict) and "x" in value):
            with pytest.raises(InputError):
                template.render(messages, variables=value)


def test_perplexity() -> None:
    try_all(lambda value: perplexity.cut(model(), value), "text", "text")
    try_all(lambda value: perplexity.cut(model(), "x", context=value), "whole", "context")
    try_all(lambda value: perplexity.cut(model(), "x", chunks=value), "whole none", "chunks")
    try_all(lambda value: perplexity.measure(model(), value), "", "windows")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": "4096"}, "context is '4096', it must be a whole number from 1: write 4096"),
        ({"context": 4096.0}, "context is 4096.0, it must be a whole number from 1: write 4096"),
        ({"threads": "2"}, "threads is '2', it must be a whole number from 1 to 256: write 2"),
        ({"threads": True}, "threads is True, it must be a whole number from 1 to 256"),
        ({"kv": "f32"}, "kv 'f32': one of auto, f16, q8, q4"),
        ({"memory": 1.5}, "memory is 1.5, it must be a whole number of bytes, or a size as"),
        ({"memory": "0B"}, "memory is 0, it must be a whole number from 1"),
        ({"contxt": 5}, "no option 'contxt': did you mean 'context'? There are context, threads"),
        ({"fallback": "yes"}, "fallback is 'yes', it must be True or False"),
        ({"prefix_cache": "a\0b"}, "prefix_cache is 'a\\x00b', it must be a path, without a NUL"),
        ({"sessions": 10**5000}, "sessions is a value of the type int, it must be a whole number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_messages_say_what_to_write(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        edge.load("no.gguf", **options)
    assert str(error.value).startswith(said)


def test_numbers_as_text_say_what_to_write() -> None:
    with pytest.raises(InputError, match=r"temperature is '0.7', .*: write 0.7$"):
        SamplingOptions(temperature="0.7")  # type: ignore[arg-type]


def test_what_is_taken_comes_back_plain() -> None:
    loading = NativeOptions(context=np.int64(5), prefix_cache=Path("x"), memory="1KiB")  # type: ignore[arg-type]
    assert (type(loading.context), loading.prefix_cache, loading.memory) == (int, "x", 1024)
    options = SamplingOptions(temperature=1, top_k=np.int32(3), logit_bias={np.int64(1): 2})
    assert type(options.temperature) is float and type(options.top_k) is int
    assert [(type(k), type(v)) for k, v in options.logit_bias.items()] == [(int, float)]
    request = Request().but({"max_tokens": np.uint8(3), "stop": ["a", "b"]})
    assert type(request.max_tokens) is int and request.stop == ("a", "b")
    talk = model().session()
    talk.generate(np.array([1, 2], np.int32))
    assert talk.tokens[:2] == [1, 2] and {type(token) for token in talk.tokens} == {int}


def test_sizes_speak_of_what_was_typed() -> None:
    from edge.sizes import parse_size, show

    assert show(parse_size("2 GB")) == "2 GB (1.86 GiB)" and show(2 * 10**9) == "1.86 GiB"
    assert parse_size("9007199254740993") == 2**53 + 1  # exact, where a float is not
    assert parse_size("0.5KiB") == 512 and copy.deepcopy(parse_size("2GB")).written == "2GB"
