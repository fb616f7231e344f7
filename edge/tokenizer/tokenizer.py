"""The Tokenizer: what the rest of edge uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge import check
from edge.errors import CancelledError, ContextError, InputError, UnsupportedError, brief
from edge.tokenizer.backend import build
from edge.tokenizer.decoder import StreamDecoder
from edge.tokenizer.huggingface import read_folder
from edge.tokenizer.pieces import GUARD, Pieces
from edge.tokenizer.spelling import Spelling
from edge.tokenizer.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    from edge.native.cancel import Cancel

__all__ = ["Tokenizer"]

#: Bytes of text for each token of the context, at most, that anybody makes room for.
_MOST_TOKEN_BYTES = 112


class Tokenizer:
    """Text to ids and ids to text for one model. Safe to use from several threads.

    n_vocab: ids are 0..n_vocab-1
    bos_id, eos_id: the ids the file names, or None
    eos_ids: all ids that end a turn or a document
    add_bos, add_eos: whether the file wants them around a text; add_eos is for those who
        embed or score texts, a prompt to be continued must not end with it, so `encode`
        never adds it
    space_prefix: encoding puts a space before the text (SentencePiece)
    notes: what the file should say and does not, and what was taken instead, a line each
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._spelling = Spelling(vocabulary)
        self._missing: UnsupportedError | None = None
        try:
            self._backend = build(vocabulary)
            self._pieces = Pieces(vocabulary, self._backend.added)
        except UnsupportedError as error:  # ids can still become text
            self._missing = error
        self.n_vocab = len(vocabulary.tokens)
        self._longest = max(len(text.encode("utf-8", "replace")) for text in vocabulary.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eos_ids = vocabulary.end_ids
        self.add_bos, self.add_eos = vocabulary.add_bos, vocabulary.add_eos
        self.space_prefix, self.notes = vocabulary.space_prefix, vocabulary.notes
        marks = {
            vocabulary.tokens[i] for i in vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
        }
        marks |= {text for text, is_special in vocabulary.surplus.items() if is_special}
        longest_first = sorted(marks, key=lambda mark: (-len(mark), mark))
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Any],
        path: str | PathLike[str] = "model",
        n_vocab: int | None = None,
    ) -> Tokenizer:
        """Build from the keys `tokenizer.ggml.*` of a GGUF file.

        path: the file's name, for messages; n_vocab: tokens that the model has. Raises
        ModelFileError for metadata that is missing or contradicts itself, UnsupportedError for a
        tokenizer that edge does not know.
        """
        return cls(Vocabulary.from_metadata(metadata, fspath(path), n_vocab))

    @classmethod
    def from_folder(
        cls,
        folder: str | PathLike[str],
        n_vocab: int,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
    ) -> Tokenizer:
        """Build from tokenizer.json and tokenizer_config.json.

        n_vocab: ids that the model has, which may be more than have a text; bos_id, eos_ids: those
        that its own files name. Raises ModelFileError for files that are missing or contradict
        themselves, UnsupportedError for a tokenizer that edge does not know.
        """
        return cls(read_folder(Path(folder), n_vocab, bos_id, eos_ids))

    def encode(
        self,
        text: str,
        *,
        special: bool = False,
        bos: bool | None = None,
        room: int | None = None,
        cancel: Cancel | None = None,
    ) -> list[int]:
        """The ids of a text.

        special: control tokens written in the text (`<|im_start|>`) count as such; otherwise
            they are letters like any others. User-defined tokens are ordinary text and are
            always one token.
        bos: begin with the bos token, once; None: if the file says so.
        room: most tokens; a text that cannot have so few is not encoded, of others no more than
            is needed to know that they have more. cancel: looked at between pieces of the text.

        Bytes for which a byte-level vocabulary has no token are left out, as in the original
        tokenizers. Raises InputError for text that is not valid Unicode (lone surrogates), has
        stretches of more than 32 KiB without a place to cut them, or needs a token that the model
        does not have; UnsupportedError where the package `tokenizers` is not installed,
        CancelledError, and ContextError for more tokens than `room`.
        """
        ids: list[int] = []
        text = check.text("text", text)
        if room is not None and len(text) > self.most_bytes(room):
            raise _too_long(-(-len(text) // self.most_bytes(1)), room, at_least=True)
        pieces = self.pieces(text, special=special, bos=bos)
        for found in pieces:
            if cancel is not None and cancel.is_set():
                raise CancelledError("the call was cancelled")
            ids += found
            if room is not None and len(ids) > room:
                raise _too_long(len(ids), room, at_least=next(pieces, None) is not None)
        return ids

    def pieces(
        self, text: str, *, special: bool = False, bos: bool | None = None
    ) -> Iterator[list[int]]:
        """`encode`, piece by piece: ids that follow each other, some thousands at a time."""
        if self._missing is not None:
            raise self._missing
        text, special = check.text("text", text), check.flag("special", special)
        bos = check.optional(check.flag, "bos", bos)
        backend = self._backend.marked if special else self._backend.plain
        starts = (self.add_bos if bos is None else bos) and self.bos_id is not None
        for piece in self._pieces.of(text):
            ids: list[int] = backend.encode(piece.text, add_special_tokens=False).ids
            if (most := max(ids, default=0)) >= self.n_vocab:
                raise InputError(
                    f"the text has the token {brief(backend.id_to_token(most))}, which the "
                    f"tokenizer has, but the model of {self.n_vocab} tokens does not: leave it out"
                )
            if starts and self.bos_id is not None and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
            starts = False
            yield ids[piece.drop :] if piece.drop else ids

    def most_bytes(self, n_tokens: int) -> int:
        """Bytes of UTF-8 that n_tokens tokens can stand for: so many of the longest one."""
        return n_tokens * max(1, min(self._longest, _MOST_TOKEN_BYTES))

    def quote(self, text: str) -> str:
        """Mark a text so that `encode(..., special=True)` takes no control token out of it.

        For text from outside that goes into a template: the template's own control tokens
        count, those that a user typed are letters. The marks (U+FDD0 inside the spelling of a
        control token) vanish in encoding.
        """
        text = check.text("text", text).replace(GUARD, "")
        return self._marks.sub(lambda m: GUARD.join(m[0]) + GUARD, text)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some ids; bytes that are no text become U+FFFD.

        special: show control tokens as they are spelled. Raises InputError for a bad id.
        """
        decoder = self.decoder(special=special)
        tokens = check.tokens("ids", ids, self.n_vocab)
        return "".join(map(decoder.push, tokens)) + decoder.flush()

    def decoder(self, *, special: bool = False, after: int | None = None) -> StreamDecoder:
        """A decoder for ids that come one by one.

        after: the token that the text continues; None: the text begins here. It matters where
        encoding puts a space before a text: the space of a continued text is its own.
        """
        return StreamDecoder(self._spelling, special=check.flag("special", special), after=after)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, its spelling for a control token.

        Raises InputError for an id outside the vocabulary.
        """
        return self._spelling.token_bytes(token)

    def token_text(self, token: int) -> str:
        """`token_bytes` as text for people: U+FFFD for a part of a character."""
        return self._spelling.token_text(token)

    def is_special(self, token: int) -> bool:
        """A control token: no part of the text, hidden unless asked for."""
        return self._spelling.is_special(token)

    def is_added(self, token: int) -> bool:
        """A token that is cut out of the text before the rest is merged."""
        return self._spelling.is_added(token)


def _too_long(n_tokens: int, room: int, *, at_least: bool) -> ContextError:
    return ContextError(
        f"the text has {'at least ' * at_least}{n_tokens} tokens, there is room for {room}: "
        "shorten it, or load the model with a larger context",
        needed=n_tokens,
        limit=room,
        at_least=at_least,
    )
