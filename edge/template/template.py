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
from typing import TYPE_CHECKING, Any

from edge import check, forked
from edge.errors import InputError, ModelFileError, TemplateError, brief
from edge.files.json_file import JsonFile, read_text
from edge.template.budget import Limits
from edge.tokenizer.huggingface import token_text
from edge.tokenizer.vocabulary import named_token

if TYPE_CHECKING:
    from edge.native.cancel import Cancel
    from edge.template.environment import Program

__all__ = ["ChatTemplate", "Limits", "compiled_bytes"]

#: The most memory of a compiled template, in bytes for each of its words and signs.
_WORD_BYTES = 4000
_WORDS = re.compile(r"\w+|[^\w\s]")


def compiled_bytes(source: str) -> int:
    """The most bytes that a compiled template takes; 0 for one that is too long to be compiled."""
    if len(source) > Limits.source_chars:
        return 0
    return _WORD_BYTES * sum(1 for _ in _WORDS.finditer(source))


class ChatTemplate:
    """A chat template, compiled at the first rendering. Safe to use from several threads.

    source: the Jinja text. bos, eos: the values of `bos_token` and `eos_token` in it.
    """

    def __init__(
        self, source: str, bos: str = "", eos: str = "", *, limits: Limits | None = None
    ) -> None:
        self.source, self.bos, self.eos = source, bos, eos
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._program: Program | None = None
        forked.watch(self)

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Any],
        path: str | PathLike[str] = "model",
        limits: Limits | None = None,
    ) -> ChatTemplate:
        """The template of a GGUF file.

        path: the file's name, for messages. Raises TemplateError when the file has no template,
        ModelFileError when its template is not text.
        """
        source = metadata.get("tokenizer.chat_template")
        if source is None:
            raise TemplateError(
                f"{fspath(path)} has no chat template: use `complete`, or pass a template"
            )
        if not isinstance(source, str):
            raise ModelFileError("not a text", path=path, field="tokenizer.chat_template")
        bos, eos = (named_token(metadata, fspath(path), name) for name in ("bos", "eos"))
        return cls(source, bos, eos, limits=limits)

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], limits: Limits | None = None) -> ChatTemplate:
        """The template of a Hugging Face folder: chat_template.jinja, or else the one in
        tokenizer_config.json; of several there, the one named "default".

        Raises TemplateError where there is none, ModelFileError for files that are damaged.
        """
        root = Path(folder)
        config = JsonFile.find(root / "tokenizer_config.json")
        source: Any = config.values.get("chat_template")
        if isinstance(source, list):
            templates = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = templates.get("default", next(iter(templates.values()), None))
        jinja_file = root / "chat_template.jinja"
        if jinja_file.exists():
            source = read_text(jinja_file)
        if source is None:
            raise TemplateError(f"{root} has no chat template: use `complete`, or pass a template")
        if not isinstance(source, str):
            raise config.error("chat_template", "not a text")
        bos, eos = token_text(config, "bos_token"), token_text(config, "eos_token")
        return cls(source, bos, eos, limits=limits)

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

        Raises InputError for messages that are not of this form; TemplateError when the template
        refuses them, fails, or goes beyond its limits; CancelledError.
        """
        variables = {} if variables is None else variables
        if not isinstance(variables, Mapping) or not all(isinstance(k, str) for k in variables):
            raise InputError(f"variables is {brief(variables)}, it must be a dict of names")
        tools = check.optional(check.mappings, "tools", tools)
        names: dict[str, Any] = {
            **{key: check.plain(f"variable {key!r}", value) for key, value in variables.items()},
            "messages": _checked(messages),
            "tools": None if tools is None else check.plain("tools", tools),
            "documents": None,
            "add_generation_prompt": check.flag("add_generation_prompt", add_generation_prompt),
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        return self._compiled(cancel).render(names, cancel)

    def _forked(self) -> None:
        self._lock = threading.Lock()  # a thread of the parent may have held the old one

    def _compiled(self, cancel: Cancel | None) -> Program:
        with self._lock:
            if self._program is None:
                from edge.template.environment import Program

                self._program = Program(self.source, self.limits, cancel)
            return self._program


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
