"""Messages to a prompt, by the Jinja template that comes with the model.

A template is a program from a stranger. It runs in jinja2's immutable sandbox, and under the bounds
of environment.py, because the sandbox stops neither endless loops nor strings of gigabytes.
jinja2 is imported when the first template is rendered.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge import check, forked
from edge.errors import InputError, ModelFileError, TemplateError, brief
from edge.files.json_file import JsonFile, read_text
from edge.template.budget import Limits
from edge.tokenizer.huggingface import token_text
from edge.tokenizer.vocabulary import named_token

if TYPE_CHECKING:
    from edge.native.cancel import Cancel
    from edge.template.environment import Program

__all__ = ["ChatTemplate", "Limits", "Sources", "templates_in"]

#: The most memory of a compiled template, in bytes for each of its words and signs.
_WORD_BYTES = 4000
_WORDS = re.compile(r"\w+|[^\w\s]")

#: Where a GGUF file has its template; others behind a dot and their name, listed by `_NAMES_KEY`.
_KEY = "tokenizer.chat_template"
_NAMES_KEY = "tokenizer.chat_templates"

#: The names of the template that is taken by default, and of the one for tools.
_DEFAULT, _TOOL_USE = "default", "tool_use"


def _compiled_bytes(source: str) -> int:
    """The most bytes that a compiled template takes; 0 for one that is too long to be compiled."""
    if len(source) > Limits.source_chars:
        return 0
    return _WORD_BYTES * sum(1 for _ in _WORDS.finditer(source))


class Sources(NamedTuple):
    """The Jinja texts of a model. plain: the usual one; tools: the one for conversations with
    tools, None: the usual one is for these, too.
    """

    plain: str
    tools: str | None = None

    @property
    def compiled_bytes(self) -> int:
        """The most bytes that they take when they are compiled."""
        return sum(map(_compiled_bytes, filter(None, self)))

    @classmethod
    def choose(cls, texts: Mapping[str, str], path: str, name: str | None) -> Sources:
        """Take the template `name` of a model's templates; None: the default one, and the one for
        tools. Raises TemplateError where there is none, InputError for a name that is not there.
        """
        if not texts:
            raise TemplateError(f"{path} has no chat template: use `complete`, or pass a template")
        if name is not None:
            if name not in texts:
                there = ", ".join(brief(text, 40) for text in list(texts)[:20])
                raise InputError(
                    f"{path} has no chat template {brief(name)}: its templates are {there}"
                )
            return cls(texts[name])
        plain = texts.get(_DEFAULT, next(iter(texts.values())))
        return cls(plain, texts.get(_TOOL_USE))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str, name: str | None) -> Sources:
        """The texts in a GGUF file, see `choose`. Raises ModelFileError for what is no text."""
        return cls.choose(templates_in(metadata, path), path, name)

    @classmethod
    def from_folder(cls, root: Path, name: str | None) -> Sources:
        """The texts in a Hugging Face folder, see `choose`: chat_template.jinja, or else the one in
        tokenizer_config.json, which may have several, with names. Raises ModelFileError.
        """
        config = JsonFile.find(root / "tokenizer_config.json")
        source: Any = config.values.get("chat_template")
        texts: dict[Any, Any] = {} if source is None else {_DEFAULT: source}
        if isinstance(source, list):
            texts = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        jinja_file = root / "chat_template.jinja"
        if jinja_file.exists():
            texts[_DEFAULT] = read_text(jinja_file)
        if not all(isinstance(text, str) for item in texts.items() for text in item):
            raise config.error("chat_template", "not a text")
        return cls.choose(texts, str(root), name)


def templates_in(metadata: Mapping[str, Any], path: str) -> dict[str, str]:
    """Name -> text of a GGUF file's templates, the default one first. Raises ModelFileError."""
    keys = {_DEFAULT: _KEY} if _KEY in metadata else {}
    names = metadata.get(_NAMES_KEY, [])
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ModelFileError("not a list of names", path=path, field=_NAMES_KEY)
    keys |= {n: f"{_KEY}.{n}" for n in names if n != _DEFAULT and f"{_KEY}.{n}" in metadata}
    others = (key for key in metadata if key.startswith(f"{_KEY}."))  # the list may be missing
    keys |= {key.removeprefix(f"{_KEY}."): key for key in others}
    for key in keys.values():
        if not isinstance(metadata[key], str):
            raise ModelFileError("not a text", path=path, field=key)
    return {name: metadata[key] for name, key in keys.items()}


class ChatTemplate:
    """A chat template, compiled at the first rendering. Safe to use from several threads.

    source: the Jinja text; for_tools: another one for conversations with tools, None: the same.
    bos, eos: the values of `bos_token` and `eos_token` in it.
    """

    def __init__(
        self,
        source: str,
        bos: str = "",
        eos: str = "",
        *,
        for_tools: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.source, self.for_tools, self.bos, self.eos = source, for_tools, bos, eos
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._programs: dict[str, Program] = {}  # by their text
        forked.watch(self)

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Any],
        path: str | PathLike[str] = "model",
        limits: Limits | None = None,
        name: str | None = None,
    ) -> ChatTemplate:
        """The template of a GGUF file.

        path: the file's name, for messages. name: of one of the file's templates; None: the default
        one, and the one named "tool_use" where tools are given. Raises TemplateError when the file
        has no template, ModelFileError when its template is not text, InputError for a name that
        is not there.
        """
        sources = Sources.from_metadata(metadata, fspath(path), name)
        bos, eos = (named_token(metadata, fspath(path), token) for token in ("bos", "eos"))
        return cls(sources.plain, bos, eos, for_tools=sources.tools, limits=limits)

    @classmethod
    def from_folder(
        cls, folder: str | PathLike[str], limits: Limits | None = None, name: str | None = None
    ) -> ChatTemplate:
        """The template of a Hugging Face folder: chat_template.jinja, or else the one in
        tokenizer_config.json. name: of one of several there, see `from_metadata`.

        Raises TemplateError where there is none, ModelFileError for files that are damaged,
        InputError for a name that is not there.
        """
        sources = Sources.from_folder(Path(folder), name)
        config = JsonFile.find(Path(folder) / "tokenizer_config.json")
        bos, eos = token_text(config, "bos_token"), token_text(config, "eos_token")
        return cls(sources.plain, bos, eos, for_tools=sources.tools, limits=limits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        cancel: Cancel | None = None,
    ) -> str:
        """The prompt for some messages.

        messages: dicts with `role` and `content`, both str; a message with `tool_calls` may have
            no content. Other keys go to the template as they are.
        tools: JSON schemas of the functions that the model may call.
        add_generation_prompt: whether to end the prompt where the assistant begins to speak.
        variables: more names for the template, such as `enable_thinking`.
        cancel: checked in each step.

        Raises InputError for messages or variables that are not of this form; TemplateError when
        the template refuses them, fails, or goes beyond its limits; CancelledError.
        """
        tools = check.optional(check.mappings, "tools", tools)
        names: dict[str, Any] = {
            **_checked_variables(variables),
            "messages": _checked(messages),
            "tools": None if tools is None else check.plain("tools", tools),
            "documents": None,
            "add_generation_prompt": check.flag("add_generation_prompt", add_generation_prompt),
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        source = self.for_tools if tools and self.for_tools is not None else self.source
        return self._compiled(source, cancel).render(names, cancel)

    def _forked(self) -> None:
        self._lock = threading.Lock()  # a thread of the parent may have held the old one

    def _compiled(self, source: str, cancel: Cancel | None) -> Program:
        with self._lock:
            if source not in self._programs:
                from edge.template.environment import Program

                self._programs[source] = Program(source, self.limits, cancel)
            return self._programs[source]


#: Names that a template always has, so that no variable can have them.
_TAKEN = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
)


def _checked_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables of a template in plain types. Raises InputError, with the name of a bad one."""
    variables = {} if variables is None else variables
    if not isinstance(variables, Mapping) or not all(isinstance(k, str) for k in variables):
        raise InputError(f"variables is {brief(variables)}, it must be a dict of names")
    for name in variables:
        if name in _TAKEN or not name.isidentifier():
            raise InputError(f"a variable of the template cannot have the name {brief(name)}")
    return {name: check.plain(f"variable {name!r}", value) for name, value in variables.items()}


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A deep copy of messages in plain types. Raises InputError, with the number of a bad one."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InputError("messages must be a list of dicts with role and content")
    if not messages:
        raise InputError("there are no messages")
    copies = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i} is a {type(message).__name__}, not a dict")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise InputError(f"message {i} has no role")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InputError(f"the content of message {i} ({role}) must be text")
        copies.append(check.plain(f"message {i}", message))
    return copies
