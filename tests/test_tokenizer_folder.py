"""Tokenizers and templates of folders in the form of Hugging Face: as those of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import CHATML, CONTROL, NORMAL, PIECES, USER, bpe, by_merges, spm

from edge.errors import InputError, ModelFileError, TemplateError, UnsupportedError
from edge.onnx.export.config import write_tokenizer
from edge.template.template import ChatTemplate
from edge.tokenizer import Tokenizer

PHI3 = dict.fromkeys(("<|user|>", "<|assistant|>", "<|end|>", "<|x|>"), -100.0)

#: Metadata of GGUF files by what is special about each.
MODELS: dict[str, dict[str, Any]] = {
    "gpt-2": bpe("a+b ab+c", CHATML, bos_token_id=258, eos_token_id=259),
    "smollm": bpe("1+2", CHATML, pre="smollm", bos_token_id=258, add_bos_token=True),
    "llama-bpe": bpe("a+b", CHATML, pre="llama-bpe", bos_token_id=257),
    "qwen2": bpe("a+b", CHATML, pre="qwen2", eos_token_id=258),
    "gpt-4o": bpe("a+b", CHATML, pre="gpt-4o"),
    "command-r": bpe("a+b", CHATML, pre="command-r", bos_token_id=257),
    "deepseek-v3": bpe("a+b 1+2", CHATML, pre="deepseek-v3", eos_token_id=258),
    "gemma4": by_merges("▁+a a+b ▁a+b \n+\n"),
    "spm": spm(PIECES),
    "spm-plain": spm(PIECES, add_space_prefix=False, add_bos_token=False),
    "phi3": spm(
        {**PIECES, **PHI3},
        token_type=[2, 3, 3] + [6] * 256 + [NORMAL] * len(PIECES) + [CONTROL] * 3 + [USER],
    ),
}
TEXTS = [
    *("", " ", "abc ab", " ab  ab", "12345 b\n\n", "\u00e9\u4e2d\U0001f600", "a\tb"),
    *("<|im_start|>ab<|im_end|> ab", "a<think>b", "<s>ab</s>", "<|user|>\n ab<|end|> b<|x|> a"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """A GGUF's tokenizer, and that of the folder it was exported to."""
    found = {}
    for name, metadata in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = Tokenizer.from_metadata(metadata), of_folder(folder, metadata)
    return found


def of_folder(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    model: Any = SimpleNamespace(metadata=metadata, path="model.gguf")
    config: Any = SimpleNamespace(n_context=64)
    v = write_tokenizer(model, config, folder)
    return Tokenizer.from_folder(folder, len(v.tokens), v.bos_id, sorted(v.end_ids))


def same(gguf: Tokenizer, folder: Tokenizer, text: str) -> None:
    for special in (False, True):
        ids = gguf.encode(text, special=special)
        assert folder.encode(text, special=special) == ids
        for shown in (False, True):
            assert folder.decode(ids, special=shown) == gguf.decode(ids, special=shown)
    quoted = folder.encode(folder.quote(text), special=True)
    assert quoted == gguf.encode(gguf.quote(text), special=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_and_text(name: str, text: str, pairs: dict[str, Any]) -> None:
    same(*pairs[name], text)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(MODELS)), st.text(max_size=20))
def test_any_text(pairs: dict[str, Any], name: str, text: str) -> None:
    same(*pairs[name], text)


@pytest.mark.parametrize("name", MODELS)
def test_same_facts(name: str, pairs: dict[str, Any]) -> None:
    gguf, folder = pairs[name]
    for fact in ("n_vocab", "bos_id", "eos_ids", "add_bos", "add_eos", "space_prefix"):
        assert getattr(folder, fact) == getattr(gguf, fact), fact
    for i in range(gguf.n_vocab):
        assert folder.token_bytes(i) == gguf.token_bytes(i)
        assert folder.is_special(i) == gguf.is_special(i)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    of_folder(tmp_path, MODELS["gpt-2"])
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_ids_without_a_text(folder: Path) -> None:
    """A model's table may have more rows than there are tokens."""
    tokenizer = Tokenizer.from_folder(folder, 300)
    assert tokenizer.n_vocab == 300 and tokenizer.token_bytes(299) == b""
    assert tokenizer.decode([97, 299, 98]) == "ab" and not tokenizer.is_special(299)
    with pytest.raises(ModelFileError, match="the model has 200"):
        Tokenizer.from_folder(folder, 200)


def add_token(folder: Path, **token: Any) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    change(folder / "tokenizer.json", added_tokens=[*added, {**rest, **token}])


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_beyond_the_models_rows(folder: Path, special: bool) -> None:
    """They are left out until a text needs one."""
    before = Tokenizer.from_folder(folder, 261)
    add_token(folder, id=261, content="[PAD]", special=special)
    tokenizer = Tokenizer.from_folder(folder, 261)
    assert tokenizer.n_vocab == 261 and tokenizer.eos_ids == before.eos_ids
    assert tokenizer.encode("ab [pad]") == before.encode("ab [pad]")
    with pytest.raises(InputError, match=r"the token '\[PAD\]', .* the model of 261 tokens"):
        tokenizer.encode("ab[PAD]", special=True)
    if special:  # what a user types is letters
        assert tokenizer.encode("ab[PAD]") == before.encode("ab[PAD]")
        quoted = tokenizer.quote("ab[PAD]")
        assert tokenizer.encode(quoted, special=True) == before.encode("ab[PAD]")


def test_surplus_that_is_no_accident(folder: Path) -> None:
    add_token(folder, id=261, content="[PAD]", special=True)
    change(folder / "tokenizer_config.json", bos_token="[PAD]")
    with pytest.raises(ModelFileError, match=r"bos_token: '\[PAD\]' is outside the vocabulary"):
        Tokenizer.from_folder(folder, 261)
    change(folder / "tokenizer_config.json", bos_token=None)
    many = [{"id": 261 + i, "content": f"[{i}]", "special": True} for i in range(1025)]
    change(folder / "tokenizer.json", added_tokens=many)
    with pytest.raises(ModelFileError, match="token 1285, the model has 261"):
        Tokenizer.from_folder(folder, 261)


def test_added_tokens_with_a_gap_of_ids(folder: Path) -> None:
    """`tokenizers` would number them otherwise than the file."""
    add_token(folder, id=270, content="[PAD]", special=True)
    with pytest.raises(ModelFileError, match=r"'\[PAD\]' leaves a gap of ids"):
        Tokenizer.from_folder(folder, 300)


def test_what_only_tokenizer_config_names(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    change(config, bos_token={"content": "<|im_start|>"}, eos_token="<think>", add_bos_token=True)
    tokenizer = Tokenizer.from_folder(folder, 261)
    assert tokenizer.bos_id == 258 and tokenizer.eos_id == 260 and tokenizer.add_bos
    assert tokenizer.is_special(260) and tokenizer.encode("a") == [258, 97]


def test_bos_by_the_last_step_alone(tmp_path: Path) -> None:
    of_folder(tmp_path, MODELS["smollm"])
    config = tmp_path / "tokenizer_config.json"
    values = json.loads(config.read_text())
    del values["add_bos_token"]
    config.write_text(json.dumps(values))
    assert Tokenizer.from_folder(tmp_path, 260, 258).add_bos
    change(tmp_path / "tokenizer.json", post_processor=None)
    assert not Tokenizer.from_folder(tmp_path, 260, 258).add_bos


def test_control_tokens_that_are_looked_for_after_the_normalizer(folder: Path) -> None:
    """Quoting works all the same."""
    file = folder / "tokenizer.json"
    added = json.loads(file.read_text())["added_tokens"]
    change(file, added_tokens=[{**token, "normalized": True} for token in added])
    tokenizer = Tokenizer.from_folder(folder, 261)
    assert 258 in tokenizer.encode("<|im_start|>", special=True)
    assert 258 not in tokenizer.encode(tokenizer.quote("<|im_start|>"), special=True)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, UnsupportedError, "'WordPiece'"),
        ({"model": 3}, ModelFileError, "where an object belongs"),
        ({"model": {"type": "BPE", "vocab": {"a": "x"}}}, ModelFileError, "'a' with the id 'x'"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}}}, ModelFileError, "token -1"),
        ({"added_tokens": [3]}, ModelFileError, "3 is no token"),
        ({"model": {"type": "BPE", "vocab": {"a": 900}}}, ModelFileError, "token 900, the model"),
        ({"added_tokens": [{"content": "x"}]}, ModelFileError, "with the id None"),
        ({"model": {"type": "BPE", "vocab": {}}, "added_tokens": []}, ModelFileError, "is empty"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a z"]}}, ModelFileError, "build"),
        ({"pre_tokenizer": {"type": "Other"}, "decoder": None}, UnsupportedError, "another kind"),
        ({"normalizer": {"type": "Strange"}}, ModelFileError, "does not build"),
    ],
)
def test_files_that_are_wrong(
    folder: Path, values: dict[str, Any], kind: type, message: str
) -> None:
    change(folder / "tokenizer.json", **values)
    with pytest.raises(kind, match=message):
        Tokenizer.from_folder(folder, 261)


def test_ids_that_the_model_does_not_have(folder: Path) -> None:
    for bos, ends in ((999, ()), (None, (3, 999))):
        with pytest.raises(ModelFileError, match="token 999 is outside the vocabulary of 261"):
            Tokenizer.from_folder(folder, 261, bos, ends)


@pytest.mark.parametrize(
    ("config", "alone", "text"),
    [
        ({"chat_template": "one"}, None, "one"),
        ({"chat_template": "one"}, "two", "two"),
        ({}, "two {{ bos_token }}{{ eos_token }}", "two <b><e>"),
        (
            {
                "chat_template": [
                    {"name": "tool", "template": "t"},
                    {"name": "default", "template": "d"},
                ]
            },
            None,
            "d",
        ),
        ({"chat_template": [{"name": "tool", "template": "t"}]}, None, "t"),
    ],
)
def test_templates(tmp_path: Path, config: dict[str, Any], alone: str | None, text: str) -> None:
    config = {"bos_token": "<b>", "eos_token": {"content": "<e>"}, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if alone is not None:
        (tmp_path / "chat_template.jinja").write_text(alone)
    template = ChatTemplate.from_folder(tmp_path)
    assert template.render([{"role": "user", "content": "x"}]) == text


def test_named_templates(tmp_path: Path) -> None:
    texts = {"tool_use": "t", "default": "d", "rag": "r"}
    listed = [{"name": name, "template": text} for name, text in texts.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    question, tools = [{"role": "user", "content": "x"}], [{"name": "f"}]
    template = ChatTemplate.from_folder(tmp_path)
    assert (template.render(question), template.render(question, tools=tools)) == ("d", "t")
    chosen = ChatTemplate.from_folder(tmp_path, name="rag")
    assert chosen.render(question, tools=tools) == "r"
    with pytest.raises(InputError, match="its templates are 'tool_use', 'default', 'rag'"):
        ChatTemplate.from_folder(tmp_path, name="other")


def test_templates_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="has no chat template"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(ModelFileError, match="not a text"):
        ChatTemplate.from_folder(tmp_path)
