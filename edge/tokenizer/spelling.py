"""How a vocabulary spells: the bytes that each token stands for."""

from __future__ import annotations

from edge import check
from edge.errors import InputError
from edge.tokenizer.pieces import SPM_SPACE
from edge.tokenizer.vocabulary import TokenType, Vocabulary, byte_of

__all__ = ["Spelling"]


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: byte-level BPE spells each byte as one printable character."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in plain}
    others = (b for b in range(0x100) if b not in set(plain))
    alphabet.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return alphabet


_BYTES = _byte_alphabet()


class Spelling:
    """The bytes and the kinds of the tokens of a vocabulary.

    n_vocab: ids are 0..n_vocab-1; space_prefix: encoding puts a space before the text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._is_spm = vocabulary.is_spm
        self._tokens, self._types = vocabulary.tokens, vocabulary.types
        self.n_vocab, self.space_prefix = len(vocabulary.tokens), vocabulary.space_prefix

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, its spelling for a control token.

        Raises InputError for an id outside the vocabulary.
        """
        token = self._id(token)
        text, kind = self._tokens[token], self._types[token]
        if kind == TokenType.BYTE and (byte := byte_of(text)) is not None:
            return bytes([byte])
        if kind in (TokenType.UNKNOWN, TokenType.CONTROL):
            return text.encode("utf-8", "replace")
        if self._is_spm:
            return text.replace(SPM_SPACE, " ").encode("utf-8", "replace")
        if kind in (TokenType.NORMAL, TokenType.UNDEFINED):
            try:
                return bytes(map(_BYTES.__getitem__, text))
            except KeyError:  # not spelled in the byte alphabet: take the text itself
                pass
        return text.encode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """`token_bytes` as text for people: U+FFFD for a part of a character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def is_special(self, token: int) -> bool:
        """Whether this is a control token: no part of the text, and not shown by default."""
        return self._types[self._id(token)] in (TokenType.UNKNOWN, TokenType.CONTROL)

    def is_added(self, token: int) -> bool:
        """Whether this token is cut out of a text before the rest is merged."""
        return self.is_special(token) or self._types[token] == TokenType.USER_DEFINED

    def _id(self, token: int) -> int:
        """A token's id, checked. Raises InputError for one outside the vocabulary."""
        token = check.whole("token", token)
        if token >= self.n_vocab:
            raise InputError(f"token {token} is outside the vocabulary of {self.n_vocab}")
        return token
