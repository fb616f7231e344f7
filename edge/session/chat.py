"""A conversation: messages, the model's template, and a session that remembers the start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from edge import check
from edge.errors import EdgeError, InputError, TemplateError
from edge.session.contents import take
from edge.session.overlap import common_text
from edge.session.request import CallOptions, Request
from edge.session.results import Completion
from edge.session.stops import AnswerText
from edge.session.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge.native.cancel import Cancel
    from edge.session.session import Session
    from edge.template.template import ChatTemplate
    from edge.tokenizer import Tokenizer

__all__ = ["Chat", "Message", "render_messages"]

#: `role` and `content`, and whatever else the model's template knows (`tool_calls`, `name`, ...).
Message = dict[str, Any]

#: The text of an answer may take more tokens than those that were sampled, which are kept.
_TIMES_SPELLED = 4


class Chat:
    """Questions and answers. One thread at a time; `cancel` from any.

    Get one from `Model.chat`, which looks whether the model's template uses the tools, or from
    `edge.resume`. session: an empty one, which the chat closes. template: the model's. system: the
    first message, for the model's conduct. tools: JSON schemas of functions, for the template.
    A model with a prefix_cache keeps the system message there.
    A question and its answer enter `messages` together, with the first token of the answer: an
    answer that was cancelled stays as far as it came, a question that failed or was cancelled
    before leaves no trace. Only what is new since the last call is computed: the tokens of an
    answer stay those that were sampled where the template asks for their text, in whatever tokens
    that encodes to. Whitespace at an answer's end that the template leaves out is cut off; where a
    window has slid so far that it cannot be, it stays.
    """

    def __init__(
        self,
        session: Session,
        template: ChatTemplate,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.session = session
        system = check.optional(check.text, "system", system)
        self.tools = check.optional(check.mappings, "tools", tools) or None
        self._template = template
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = [dict(message) for message in self._first]
        self._question: _Turn | None = None  # the last one that was asked
        self._answer: _Turn | None = None  # the one that grows
        self._keeps = self._should_keep()
        session.about = self._state

    @classmethod
    def of_state(
        cls,
        session: Session,
        template: ChatTemplate,
        state: Mapping[str, Any],
        tokens: Sequence[int],
    ) -> Chat:
        """The conversation of a session file, in a new session. state: what the file says of it;
        tokens: the file's. An answer that was cut off is kept as a cancelled one would be.

        Raises ValueError, TypeError, KeyError for a state that cannot be.
        """
        tools = take(state, "tools", list, type(None))
        if not all(isinstance(tool, dict) for tool in tools or ()):
            raise TypeError("tools are no dicts")
        chat = cls(session, template, tools=tools)
        chat._first = [_message(message) for message in take(state, "first", list)]
        for message in chat._first:
            take(message, "content", str)
        chat._messages = [_message(message) for message in take(state, "messages", list)]
        question = take(state, "asked", dict, type(None))
        if question is not None and 0 < (at := take(state, "answer_at", int)) < len(tokens):
            text = _text_of(session.model.tokenizer, tokens, at, take(state, "stop", list))
            chat._messages += [_message(question), {"role": "assistant", "content": text}]
        return chat

    @property
    def messages(self) -> list[Message]:
        """The conversation, oldest first: yours to read, and to change between calls."""
        if (answer := self._answer) is not None:
            answer.message["content"] = answer.stream.text
            if answer.stream.ended:
                self._answer = None
        return self._messages

    @property
    def system(self) -> str | None:
        """The system message. Another one, or None, counts from the next question on."""
        return str(self._first[0]["content"]) if self._first else None

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not isinstance(text, str):
            raise InputError("a system message is text, or None")
        with self.session.hold():
            messages = self.messages
            if messages and messages[0]["role"] == "system":
                del messages[0]
            self._first = [{"role": "system", "content": text}] if text else []
            messages[:0] = [dict(message) for message in self._first]
            self._keeps = self._should_keep()
            self.session.update_file()

    def stream(self, message: str | Message, **options: Unpack[CallOptions]) -> Stream:
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
        question = dict(message)
        messages = [*self.messages, question]

        def encode(request: Request, cancel: Cancel) -> list[int]:
            session = self.session
            tokenizer, content = session.model.tokenizer, question.get("content")
            if isinstance(content, str):
                session.transcript.check_text(content, tokenizer, reuse=request.reuse)
            text = self._render(messages, request, cancel)
            return self._keeping(session.encode(text, request, cancel, times=_TIMES_SPELLED))

        options["reuse"] = options["special"] = True
        stream = self.session.begin(encode, options)
        self._question, self._answer = _Turn(stream, question), None
        stream.watch(partial(self._record, self._question))
        return stream

    def send(self, message: str | Message, **options: Unpack[CallOptions]) -> Completion:
        """As `stream`, run to the end."""
        return self.stream(message, **options).finish()

    def cancel(self) -> None:
        """End the answer that is under way, from any thread, within one chunk of its work."""
        self.session.cancel()

    def undo(self) -> Message | None:
        """Take the last question and what came after it out of `messages`, and end an answer under
        way. Returns the question, None where there is none.
        """
        with self.session.hold():
            messages = self.messages
            questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
            if not questions:
                return None
            self.session.end_stream()
            self._answer = self._question = None
            question = messages[questions[-1]]
            del messages[questions[-1] :]
            self.session.update_file()
            return question

    def reset(self) -> None:
        """Forget the conversation, but for the system message it began with."""
        self.session.reset()
        self._answer = self._question = None
        self._messages[:] = [dict(message) for message in self._first]
        with self.session.hold():
            self.session.update_file()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file that `edge.resume` goes on from, see `Session.save`."""
        self.session.save(path)

    def autosave(self, path: str | os.PathLike[str], every: int = 32) -> None:
        """Keep a file that survives the process, see `Session.autosave`."""
        self.session.autosave(path, every)

    def close(self) -> None:
        """Cancel what is under way and give the cache's memory back."""
        self.session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def render(self) -> str:
        """The text of the conversation so far, see `render_messages`. Raises TemplateError."""
        return self._render(self.messages, self.session.defaults)

    def _render(
        self, messages: Sequence[Message], request: Request, cancel: Cancel | None = None
    ) -> str:
        tokenizer, about = self.session.model.tokenizer, (self.tools, request.variables)
        return render_messages(tokenizer, self._template, messages, *about, cancel)

    def _should_keep(self) -> bool:
        """Whether the system message is to be written to the model's prefix_cache."""
        return bool(self._first) and self.session.model.engine.keeps_prompts

    def _state(self) -> dict[str, Any]:
        """What a file of the session needs for the conversation, see `of_state`.

        An answer under way, and its question, are not in the messages there: the answer is what
        the tokens hold from answer_at on.
        """
        messages = list(self.messages)
        state: dict[str, Any] = {"first": self._first, "tools": self.tools, "asked": None}
        question, answer = self._question, self._answer
        if question is not None and not question.stream.ended:
            is_last = answer is not None and bool(messages) and messages[-1] is answer.message
            if is_last:
                del messages[-2:]
            if is_last or answer is None:
                stream = question.stream
                state["answer_at"] = stream.usage.prompt_tokens  # 0: its prompt was not read yet
                state["asked"], state["stop"] = question.message, list(stream.request.stop)
        return {"chat": state | {"messages": messages}}

    def _keeping(self, ids: list[int]) -> list[int]:
        """A prompt's tokens with those of the session in place of its first ones, as far as the
        text is the same.
        """
        transcript, tokenizer = self.session.transcript, self.session.model.tokenizer
        n, n_same = common_text(tokenizer, transcript.tokens, ids)
        if not transcript.can_cut(n):
            trimmed = common_text(tokenizer, transcript.tokens, ids, trimmed=True)
            if transcript.can_cut(trimmed[0]):
                n, n_same = trimmed
        return [*transcript.tokens[:n], *ids[n_same:]]

    def _record(self, question: _Turn) -> None:
        """Take question and answer into the messages once there is an answer."""
        stream = question.stream
        if self._answer is None and (stream.n_tokens or stream.finish_reason == "stop"):
            answer = {"role": "assistant", "content": ""}
            self._messages += [question.message, answer]
            self._answer = _Turn(stream, answer)
        if self._keeps and self._answer and stream.ended:  # no earlier: a disk takes its time
            self._keeps = False
            self._keep_system()

    def _keep_system(self) -> None:
        """Write what was computed of the system message to disk. Nothing is lost where the disk
        refuses, or the template wants a question.
        """
        with suppress(EdgeError):
            tokenizer, transcript = self.session.model.tokenizer, self.session.transcript
            text = self._render(self._first, self.session.defaults)
            n_common = transcript.common_prefix(tokenizer.encode(text, special=True))
            transcript.cache.keep(n_common)


@dataclass(frozen=True)
class _Turn:
    """A question, or an answer, and the stream of the answer."""

    stream: Stream
    message: Message


def _message(value: Any) -> Message:
    """A message out of a file. Raises ValueError, TypeError."""
    message = dict(value)
    take(message, "role", str)
    return message


def uses_tools(
    template: ChatTemplate,
    first: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any] | None = None,
) -> bool:
    """Whether tools leave a trace in the prompt of a conversation that begins with these messages
    and a question. Raises TemplateError.
    """
    messages = [*first, {"role": "user", "content": "?"}]
    for _ in range(3):
        with_tools = template.render(messages, tools=tools, variables=variables)
        try:
            plain, again = (template.render(messages, variables=variables) for _ in range(2))
        except TemplateError:  # it cannot do without
            return True
        if plain == again:  # one that prints the time may come between two seconds
            return with_tools != plain
    return True


def _text_of(tokenizer: Tokenizer, tokens: Sequence[int], start: int, stop: Sequence[str]) -> str:
    """The text of an answer, tokens[start:], with the stop strings that it had."""
    answer = AnswerText(tokenizer, stop, after=tokens[start - 1])
    pieces = [answer.push(token) for token in tokens[start:] if token not in tokenizer.eos_ids]
    return "".join(pieces) + answer.flush()


def render_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    cancel: Cancel | None = None,
) -> str:
    """The text of a conversation, up to where the assistant speaks; to be encoded as `special`.

    Control tokens come from the template alone: one that is written in a message, a tool or a
    variable is quoted before the template sees it (`Tokenizer.quote`) and ends up as plain letters,
    so that nobody can end their own turn and begin another's. All other text goes through the
    template as it is, since templates trim, compare and split contents.
    Raises TemplateError, CancelledError.
    """
    quote = tokenizer.quote
    return template.render(
        [check.plain(f"message {i}", message, quote) for i, message in enumerate(messages)],
        tools=check.plain("tools", tools, quote),
        add_generation_prompt=True,
        variables=check.plain("variables", variables or {}, quote),
        cancel=cancel,
    )
