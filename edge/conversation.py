"""A conversation: messages, the model's template, and a session that remembers the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from edge.errors import EdgeError, InputError
from edge.kv import WhenFull
from edge.request import Options
from edge.results import Completion
from edge.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge.chat import ChatTemplate
    from edge.model import Model
    from edge.tokenizer import Tokenizer

__all__ = ["Chat", "Message", "encode_messages"]

#: `role` and `content`, and whatever else the model's template knows (`tool_calls`, `name`, ...).
Message = dict[str, Any]

_MAX_NESTING = 64  # levels of lists and dicts in a message


class Chat:
    """Questions and answers. One thread at a time; `cancel` from any.

    system: the first message, for the model's conduct. tools: JSON schemas of functions, for the
    template. when_full: see `Session`. options: defaults for each call, see `edge.request.Request`.
    A model with a prefix_cache keeps the system message there.
    A question and its answer enter `messages` together, with the first token of the answer: an
    answer that was cancelled stays as far as it came, a question that failed or was cancelled
    before leaves no trace. Only what is new since the last call is computed.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        when_full: WhenFull = "stop",
        **options: Unpack[Options],
    ) -> None:
        self._model = model
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = [dict(message) for message in self._first]
        self.tools = [dict(tool) for tool in tools] if tools else None
        self._live: tuple[Stream, Message] | None = None  # the answer that grows
        self.session = model.session(when_full, **options)
        self._keeps = bool(self._first) and model.engine.pool.store is not None

    @property
    def messages(self) -> list[Message]:
        """The conversation, oldest first: yours to read, and to change between calls."""
        if self._live is not None:
            stream, answer = self._live
            answer["content"] = stream.text
            if stream.ended:
                self._live = None
        return self._messages

    def stream(self, message: str | Message, **options: Unpack[Options]) -> Stream:
        """Ask, and get the answer in pieces.

        message: the user's text, or a whole message (such as a tool's result).
        Raises InputError for a message or option that cannot be, ContextError when the
        conversation does not fit, TemplateError when the template refuses it.
        """
        if isinstance(message, str):
            message = {"role": "user", "content": message}
            if not message["content"]:
                raise InputError("the message is empty")
        elif not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError("a message is text, or a dict with a role")
        model, asked = self._model, dict(message)
        ids = encode_messages(model.tokenizer, model.template, [*self.messages, asked], self.tools)
        options["reuse"] = True
        stream = self.session.stream(ids, **options)
        self._live = None
        stream.watch(partial(self._record, stream, asked))
        return stream

    def send(self, message: str | Message, **options: Unpack[Options]) -> Completion:
        """As `stream`, run to the end."""
        return self.stream(message, **options).finish()

    def cancel(self) -> None:
        """End the answer that is under way, from any thread, within one chunk of its work."""
        self.session.cancel()

    def reset(self) -> None:
        """Forget the conversation, but for the system message it began with."""
        self.session.reset()
        self._live = None
        self._messages[:] = [dict(message) for message in self._first]

    def close(self) -> None:
        """Cancel what is under way and give the cache's memory back."""
        self.session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _record(self, stream: Stream, asked: Message) -> None:
        """Take question and answer into the messages once there is an answer."""
        if self._live is None and (stream.pieces or stream.finish_reason == "stop"):
            answer = {"role": "assistant", "content": ""}
            self._messages += [asked, answer]
            self._live = stream, answer
        if self._keeps and self._live and stream.ended:  # not before: the disk would be waited for
            self._keeps = False
            self._keep_system()

    def _keep_system(self) -> None:
        """Write what was computed of the system message to disk; a disk that refuses, or a template
        that wants a question, hurts nobody.
        """
        with suppress(EdgeError):
            model = self._model
            alone = encode_messages(model.tokenizer, model.template, self._first, self.tools)
            self.session._keep_prefix(alone)


def encode_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation, up to where the assistant speaks.

    Control tokens come from the template alone: one that is written in a message, or in a tool, is
    quoted before the template sees it (`Tokenizer.quote`) and ends up as plain letters, so that
    nobody can end their own turn and begin another's. All other text goes through the template as
    it is, since templates trim, compare and split contents.
    Raises InputError for text that is not Unicode, TemplateError.
    """
    text = template.render(
        _quoted(list(messages), tokenizer.quote),
        tools=_quoted(tools, tokenizer.quote),
        add_generation_prompt=True,
    )
    return tokenizer.encode(text, special=True)


def _quoted(value: Any, quote: Callable[[str], str], depth: int = 0) -> Any:
    """A copy of lists and dicts with each string quoted."""
    if isinstance(value, str):
        return quote(value)
    if depth > _MAX_NESTING:
        raise InputError(f"a message is nested more than {_MAX_NESTING} levels deep")
    if isinstance(value, Mapping):
        return {
            _quoted(key, quote, depth + 1): _quoted(item, quote, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_quoted(item, quote, depth + 1) for item in value]
    return value
