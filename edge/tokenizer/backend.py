"""The `tokenizers` objects that do the merging: one for ordinary text, one for marked-up text.

Both share one BPE model, so the vocabulary is in memory once. They differ in the tokens that they
cut out of a text before anything else: both cut out user-defined tokens, only `marked` cuts out
control tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from edge.errors import ModelFileError, UnsupportedError, brief
from edge.tokenizer.cost import MOST_SPM_MERGES
from edge.tokenizer.pieces import GUARD, SPM_SPACE
from edge.tokenizer.presplit import pre_split
from edge.tokenizer.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Encoders", "build", "spm_merges"]

# Phi-3's control tokens swallow the white space after them, and GGUF has no field for that. Only
# Phi-3 has these three tokens in a SentencePiece vocabulary, so they identify it.
_PHI3_MARKS = ("<|user|>", "<|assistant|>", "<|end|>")
_PHI3_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")


class Encoders(NamedTuple):
    """plain: for ordinary text; marked: for text in which control tokens count as such; added: the
    tokens that one of the two cuts out of a text before anything else.
    """

    plain: tokenizers.Tokenizer
    marked: tokenizers.Tokenizer
    added: list[tokenizers.AddedToken]


def build(vocabulary: Vocabulary) -> Encoders:
    """Build both tokenizers. ModelFileError when the vocabulary contradicts itself,
    UnsupportedError where the package `tokenizers` is not installed.
    """
    try:
        import_module("tokenizers")
    except ImportError as error:
        is_installed = not isinstance(error, ModuleNotFoundError)
        raise UnsupportedError(
            "a prompt that is text needs the package tokenizers"
            f"{', which is there and cannot be loaded' * is_installed}: {error}",
            what="text",
            supported=["token ids"],
        ) from error
    if vocabulary.file is not None:
        return _of_file(vocabulary, vocabulary.file)
    return _of_lists(vocabulary)


def _of_lists(vocabulary: Vocabulary) -> Encoders:
    """Build both from the vocabulary's tokens, and its merges or scores."""
    from tokenizers import AddedToken, Tokenizer, models

    backwards = range(len(vocabulary.tokens) - 1, -1, -1)
    ids = dict(zip(reversed(vocabulary.tokens), backwards, strict=True))  # lowest id wins
    for left, right in vocabulary.merges:  # `tokenizers` may panic there, and print a trace
        if left + right not in ids:
            raise ModelFileError(
                f"the merge of {brief(left)} and {brief(right)} makes no token",
                path=vocabulary.path,
                field="tokenizer.ggml.merges",
            )
    with _failures(vocabulary, "merges" if vocabulary.merges else "tokens"):
        if vocabulary.is_spm:
            by_scores = vocabulary.model == "llama"
            unknown = vocabulary.ids_of(TokenType.UNKNOWN)
            model = models.BPE(
                ids,
                spm_merges(vocabulary) if by_scores else vocabulary.merges,
                unk_token=vocabulary.tokens[unknown[0]] if unknown else None,
                fuse_unk=True,
                byte_fallback=True,
                cache_capacity=0,  # the cache is for words, and here a whole text is one word
            )
        else:
            ignore_merges = pre_split(vocabulary.pre).ignore_merges
            model = models.BPE(ids, vocabulary.merges, ignore_merges=ignore_merges)

    def added(*types: TokenType, swallow: bool = False) -> list[AddedToken]:
        texts = dict.fromkeys(vocabulary.tokens[i] for i in vocabulary.ids_of(*types))
        return [
            AddedToken(t, normalized=False, rstrip=swallow and t not in _PHI3_KEEP_SPACE)
            for t in texts
        ]

    plain, marked = Tokenizer(model), Tokenizer(model)
    _set_pipeline(plain, vocabulary, guarded=False)
    _set_pipeline(marked, vocabulary, guarded=True)
    user_defined = added(TokenType.USER_DEFINED)
    plain.add_tokens(user_defined)
    marked.add_tokens(user_defined)
    swallow = vocabulary.model == "llama" and all(m in ids for m in _PHI3_MARKS)
    control = added(TokenType.CONTROL, TokenType.UNKNOWN, swallow=swallow)
    marked.add_special_tokens(control)
    return Encoders(plain, marked, [*user_defined, *control])


def _of_file(vocabulary: Vocabulary, file: str) -> Encoders:
    """Build both from a tokenizer.json: its model, its steps and its added tokens. The tokens are
    added in the order of their ids, because `tokenizers` gives each the next free id.
    """
    from tokenizers import Tokenizer, normalizers

    with _failures(vocabulary):
        whole = Tokenizer.from_file(file)
        plain, marked = Tokenizer(whole.model), Tokenizer(whole.model)
        for backend in (plain, marked):
            if whole.normalizer is not None:
                backend.normalizer = whole.normalizer
            if whole.pre_tokenizer is not None:
                backend.pre_tokenizer = whole.pre_tokenizer
            added = sorted(whole.get_added_tokens_decoder().items())
            in_order = [token for _, token in added]
            for is_special, tokens in groupby(in_order, lambda token: token.special):
                if is_special:
                    backend.add_special_tokens([_special(token) for token in tokens])
                else:
                    backend.add_tokens(list(tokens))
        for i, token in added:  # `tokenizers` leaves no gaps between ids, even where the file does
            if i < len(vocabulary.tokens) and vocabulary.tokens[i] != token.content:
                raise ValueError(f"the added token {brief(token.content)} leaves a gap of ids")
        guard = normalizers.Replace(GUARD, "")
        steps = [guard] if whole.normalizer is None else [guard, whole.normalizer]
        marked.normalizer = normalizers.Sequence(steps)
        plain.encode_special_tokens = True
    return Encoders(plain, marked, in_order)


def _special(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    """The same token, looked for before the text is normalized: normalizing removes the guard."""
    from tokenizers import AddedToken

    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=True,
    )


@contextmanager
def _failures(vocabulary: Vocabulary, key: str = "") -> Iterator[None]:
    """Raise ModelFileError in place of what `tokenizers` raises: Exception, or Rust's panics."""
    try:
        yield
    except ModelFileError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(
            f"the vocabulary does not build: {message}",
            path=vocabulary.path,
            field=f"tokenizer.ggml.{key}" if key else None,
        ) from error


def _set_pipeline(backend: tokenizers.Tokenizer, vocabulary: Vocabulary, *, guarded: bool) -> None:
    """Set the normaliser and the pre-tokenizer. Both see only the text between added tokens."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[normalizers.Normalizer] = []
    if guarded:
        steps.append(normalizers.Replace(GUARD, ""))
    if vocabulary.is_spm:
        if vocabulary.space_prefix:
            steps.append(normalizers.Prepend(SPM_SPACE))
        steps.append(normalizers.Replace(" ", SPM_SPACE))
    else:
        row = pre_split(vocabulary.pre)
        if row.nfc:
            steps.append(normalizers.NFC())
        splits: list[pre_tokenizers.PreTokenizer] = []
        if row.split_digits:
            splits.append(pre_tokenizers.Digits(individual_digits=True))
        splits += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.patterns]
        splits.append(
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=row.pattern is None)
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    if steps:
        backend.normalizer = normalizers.Sequence(steps)


def spm_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply, best first.

    SentencePiece joins the two neighbours whose union has the highest score. So every way to cut a
    piece into two pieces is a merge, and the score of the whole piece is its rank.
    Raises ModelFileError for more merges than MOST_SPM_MERGES, for which memory is planned.
    """
    normal = (TokenType.NORMAL, TokenType.UNDEFINED)
    pieces = {
        text: score
        for text, score, t in zip(
            vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True
        )
        if t in normal
    }
    lengths = set(map(len, pieces))
    each, beyond = MOST_SPM_MERGES
    most = each * len(vocabulary.tokens) + beyond
    merges: list[tuple[str, str]] = []
    for piece in sorted(pieces, key=pieces.__getitem__, reverse=True):  # stable: ties by id
        for cut in range(1, len(piece)):
            if cut in lengths and len(piece) - cut in lengths:
                left, right = piece[:cut], piece[cut:]
                if left in pieces and right in pieces:
                    merges.append((left, right))
        if len(merges) > most:
            raise ModelFileError(
                f"the pieces can be cut into others in more than {most} ways",
                path=vocabulary.path,
                field="tokenizer.ggml.tokens",
            )
    return merges
