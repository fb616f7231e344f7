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

#: The most bytes of text, for each token of the context, that memory is planned for.
_MOST_TOKEN_BYTES = 112


class Tokenizer:
    """Text to ids and ids to text for one model. Safe to use from several threads.

    n_vocab: ids are 0..n_vocab-1
    bos_id, eos_id: the ids that the file names, or None
    eos_ids: all ids that end a turn or a document
    add_bos, add_eos: whether the file wants these tokens around a text. `encode` never adds eos,
        because a prompt to be continued must not end with it; add_eos is for callers that embed or
        score texts
    space_prefix: whether encoding puts a space before the text (SentencePiece)
    notes: a line for each key that the file lacks: its name and what was assumed instead
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._spelling = Spelling(vocabulary)
        self._missing: UnsupportedError | None = None
        try:
            self._backend = build(vocabulary)
            self._pieces = Pieces(vocabulary, self._backend.added)
        except UnsupportedError as error:  # ids can still be decoded
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

        path: the file's name, for messages; n_vocab: how many tokens the model has.
        Raises ModelFileError for metadata that is missing or contradicts itself, UnsupportedError
        for a tokenizer that edge does not know.
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

        n_vocab: how many ids the model has; some of them may have no text. bos_id, eos_ids: the ids
        that the model's own files name.
        Raises ModelFileError for files that are missing or contradict themselves, UnsupportedError
        for a tokenizer that edge does not know.
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

        special: whether control tokens written in the text (`<|im_start|>`) count as such;
            otherwise they are letters like any others. User-defined tokens are ordinary text and
            are always one token.
        bos: whether to begin with the bos token, once; None: if the file says so.
        room: the most tokens. A text of too many bytes for so few tokens is not encoded at all;
            encoding stops at the first piece that goes beyond `room`.
        cancel: checked between pieces of the text.

        Bytes for which a byte-level vocabulary has no token are left out, as in the original
        tokenizers.
        Raises InputError for text that is not valid Unicode (lone surrogates), has a stretch of
        more than 32 KiB without a place for a cut, or needs a token that the model does not have;
        UnsupportedError where the package `tokenizers` is not installed; CancelledError;
        ContextError for more tokens than `room`.
        """
        ids: list[int] = []
        text = check.text("text", text)
        if room is not None and len(text) > self.most_bytes(room):
            raise _too_long(-(-len(text) // self.most_bytes(1)), room, at_least=True)
        pieces = self.pieces(text, special=special, bos=bos)
        for piece in pieces:
            if cancel is not None and cancel.is_set():
                raise CancelledError("the call was cancelled")
            ids += piece
            if room is not None and len(ids) > room:
                raise _too_long(len(ids), room, at_least=next(pieces, None) is not None)
        return ids

    def pieces(
        self, text: str, *, special: bool = False, bos: bool | None = None
    ) -> Iterator[list[int]]:
        """The ids of a text, as of `encode`, piece by piece: some thousands at a time."""
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
        """The most bytes of UTF-8 that n_tokens tokens can stand for."""
        return n_tokens * max(1, min(self._longest, _MOST_TOKEN_BYTES))

    def quote(self, text: str) -> str:
        """Mark a text so that `encode(..., special=True)` takes no control token out of it.

        This is for text from outside that goes into a template: the template's own control tokens
        count as such, control tokens that a user typed stay letters. The marks (U+FDD0 inside the
        spelling of a control token) vanish in encoding.
        """
        text = check.text("text", text).replace(GUARD, "")
        return self._marks.sub(lambda m: GUARD.join(m[0]) + GUARD, text)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some ids; bytes that are not valid UTF-8 become U+FFFD.

        special: whether to show control tokens, as they are spelled. Raises InputError for a bad
        id.
        """
        decoder = self.decoder(special=special)
        tokens = check.tokens("ids", ids, self.n_vocab)
        return "".join(map(decoder.push, tokens)) + decoder.flush()

    def decoder(self, *, special: bool = False, after: int | None = None) -> StreamDecoder:
        """A decoder for ids that come one by one.

        after: the token that the text continues; None: the text begins here. At the beginning of a
        text the decoder removes the space that encoding put there (see space_prefix); a continued
        text keeps its space.
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
        """Whether this is a control token: no part of the text, and not shown by default."""
        return self._spelling.is_special(token)

    def is_added(self, token: int) -> bool:
        """Whether this token is cut out of a text before the rest is merged."""
        return self._spelling.is_added(token)


def _too_long(n_tokens: int, room: int, *, at_least: bool) -> ContextError:
    return ContextError(
        f"the text has {'at least ' * at_least}{n_tokens} tokens, there is room for {room}: "
        "shorten it, or load the model with a larger context",
        needed=n_tokens,
        limit=room,
        at_least=at_least,
    )
