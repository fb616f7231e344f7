"""A conversation: messages, the model's template, and a session that remembers the start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from edge import check
from edge.errors import EdgeError, InputError, TemplateError
from edge.kv.shape import WhenFull
from edge.session.contents import take
from edge.session.overlap import common_text
from edge.session.request import CallOptions, Request
from edge.session.results import Completion
from edge.session.stops import AnswerText
from edge.session.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge.model import Model
    from edge.native.cancel import Cancel
    from edge.template.template import ChatTemplate
    from edge.tokenizer import Tokenizer

__all__ = ["Chat", "Message", "render_messages"]

#: `role` and `content`, and whatever else the model's template knows (`tool_calls`, `name`, ...).
Message = dict[str, Any]

#: The text of an answer may take more tokens than those that were sampled, which are kept.
_TIMES_SPELLED = 4


class Chat:
    """Questions and answers. One thread at a time; `cancel` from any.

    Get one from `Model.chat`, which looks whether the model's template uses the tools.
    system: the first message, for the model's conduct. tools: JSON schemas of functions, for the
    template. when_full: see `Session`. options: defaults for each call, see
    `edge.session.request.Request`.
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
        model: Model,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        when_full: WhenFull = "stop",
        **options: Unpack[CallOptions],
    ) -> None:
        self._model = model
        system = check.optional(check.text, "system", system)
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = [dict(message) for message in self._first]
        self.tools = check.optional(check.mappings, "tools", tools) or None
        self._live: tuple[Stream, Message] | None = None  # the answer that grows
        self._asked: tuple[Stream, Message] | None = None  # the last question
        self.session = model.session(when_full, **options)
        self.session._about = self._state
        self._keeps = bool(self._first) and model.engine.keeps_prompts

    @property
    def messages(self) -> list[Message]:
        """The conversation, oldest first: yours to read, and to change between calls."""
        if self._live is not None:
            stream, answer = self._live
            answer["content"] = stream.text
            if stream.ended:
                self._live = None
        return self._messages

    @property
    def system(self) -> str | None:
        """The system message. Another one, or None, counts from the next question on."""
        return str(self._first[0]["content"]) if self._first else None

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not isinstance(text, str):
            raise InputError("a system message is text, or None")
        with self.session._exclusive():
            messages = self.messages
            if messages and messages[0]["role"] == "system":
                del messages[0]
            self._first = [{"role": "system", "content": text}] if text else []
            messages[:0] = [dict(message) for message in self._first]
            self._keeps = bool(self._first) and self._model.engine.keeps_prompts
            self.session._write_journal()

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
        model, asked = self._model, dict(message)
        messages = [*self.messages, asked]

        def encode(request: Request, cancel: Cancel) -> list[int]:
            if isinstance(asked.get("content"), str):
                self.session.transcript.check_text(
                    asked["content"], model.tokenizer, reuse=request.reuse
                )
            text = render_messages(model.tokenizer, model.template, messages, self.tools, cancel)
            ids = self.session._encode(text, request, cancel, times=_TIMES_SPELLED)
            return self._keeping(ids)

        options["reuse"] = options["special"] = True
        stream = self.session._begin(encode, options)
        self._live, self._asked = None, (stream, asked)
        stream.watch(partial(self._record, stream, asked))
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
        with self.session._exclusive():
            messages = self.messages
            asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
            if not asked:
                return None
            self.session._current = self._live = self._asked = None
            question = messages[asked[-1]]
            del messages[asked[-1] :]
            self.session._write_journal()
            return question

    def reset(self) -> None:
        """Forget the conversation, but for the system message it began with."""
        self.session.reset()
        self._live = self._asked = None
        self._messages[:] = [dict(message) for message in self._first]
        with self.session._exclusive():
            self.session._write_journal()

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

    def _state(self) -> dict[str, Any]:
        """What a file of the session needs for the conversation.

        An answer under way, and its question, are not in the messages there: the answer is what
        the tokens hold from answer_at on.
        """
        messages = list(self.messages)
        state: dict[str, Any] = {"first": self._first, "tools": self.tools, "asked": None}
        if self._asked is not None and not self._asked[0].ended:
            stream, asked = self._asked
            if self._live is not None and messages and messages[-1] is self._live[1]:
                del messages[-2:]
            if len(messages) < len(self._messages) or self._live is None:
                state["answer_at"] = stream.usage.prompt_tokens  # 0: its prompt was not read yet
                state["asked"], state["stop"] = asked, list(stream.request.stop)
        return {"chat": state | {"messages": messages}}

    def _resume(self, state: dict[str, Any], tokens: Sequence[int]) -> None:
        """Take over what `_state` gave. Raises ValueError, TypeError, KeyError for other things.

        tokens: the session's. An answer that was cut off is kept as a cancelled one would be.
        """
        self._first = [_message(message) for message in take(state, "first", list)]
        for message in self._first:
            take(message, "content", str)
        self._messages = [_message(message) for message in take(state, "messages", list)]
        asked = take(state, "asked", dict, type(None))
        if asked is not None and 0 < (at := take(state, "answer_at", int)) < len(tokens):
            text = _text_of(self._model.tokenizer, tokens, at, take(state, "stop", list))
            self._messages += [_message(asked), {"role": "assistant", "content": text}]

    def _keeping(self, ids: list[int]) -> list[int]:
        """A prompt's tokens with those of the session in place of its first ones, as far as the
        text is the same.
        """
        transcript, tokenizer = self.session.transcript, self._model.tokenizer
        n, n_same = common_text(tokenizer, transcript.tokens, ids)
        if not transcript.can_cut(n):
            trimmed = common_text(tokenizer, transcript.tokens, ids, trimmed=True)
            if transcript.can_cut(trimmed[0]):
                n, n_same = trimmed
        return [*transcript.tokens[:n], *ids[n_same:]]

    def _record(self, stream: Stream, asked: Message) -> None:
        """Take question and answer into the messages once there is an answer."""
        if self._live is None and (stream.n_tokens or stream.finish_reason == "stop"):
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
            model, transcript = self._model, self.session.transcript
            alone = render_messages(model.tokenizer, model.template, self._first, self.tools)
            n_common = transcript.common_prefix(model.tokenizer.encode(alone, special=True))
            transcript.cache.keep(n_common)


def _message(value: Any) -> Message:
    """A message out of a file. Raises ValueError, TypeError."""
    message = dict(value)
    take(message, "role", str)
    return message


def uses_tools(
    template: ChatTemplate, first: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether tools leave a trace in the prompt of a conversation that begins with these messages
    and a question. Raises TemplateError.
    """
    messages = [*first, {"role": "user", "content": "?"}]
    for _ in range(3):
        with_tools = template.render(messages, tools=tools)
        try:
            plain, again = template.render(messages), template.render(messages)
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
    cancel: Cancel | None = None,
) -> str:
    """The text of a conversation, up to where the assistant speaks; to be encoded as `special`.

    Control tokens come from the template alone: one that is written in a message, or in a tool, is
    quoted before the template sees it (`Tokenizer.quote`) and ends up as plain letters, so that
    nobody can end their own turn and begin another's. All other text goes through the template as
    it is, since templates trim, compare and split contents.
    Raises TemplateError, CancelledError.
    """
    quote = tokenizer.quote
    return template.render(
        [check.plain(f"message {i}", message, quote) for i, message in enumerate(messages)],
        tools=None if tools is None else check.plain("tools", list(tools), quote),
        add_generation_prompt=True,
        cancel=cancel,
    )
