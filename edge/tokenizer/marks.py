"""Tokens that end an answer, by their spelling: a file names one of them by id, but seldom all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["END_MARKS", "end_marks"]

#: Spellings that mean an end in every vocabulary, whatever type the file gives the token: careless
#: converters write 'normal'. A token that is merged from letters is text all the same, such as
#: Qwen's `</s>`, HTML's end of struck-out text, at which llama.cpp ends answers. The list is
#: llama.cpp's, and DeepSeek Coder's own tokens.
END_MARKS = frozenset(
    {
        # of a text
        "</s>",
        "<eos>",
        "[EOS]",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
        "[e~[",  # MiniMax
        # of a turn
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|EOT|>",  # DeepSeek Coder
        "<EOT>",
        "_<EOT>",
        "\u2581<EOT>",  # CodeLlama
        "[EOT]",
        "<end_of_turn>",
        "<turn|>",
        "<end_of_utterance>",
        # of a turn that calls a function, or waits for its result
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|tool_response>",
        # of text that fills a gap, where another file begins
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    }
)

# Tokens of vocabularies in which <|end|> ends a message, but not the turn: gpt-oss, Solar.
_ONE_OF_SEVERAL = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})


def end_marks(
    tokens: Sequence[str], is_control: Callable[[int], bool], is_merged: Callable[[str], bool]
) -> frozenset[int]:
    """The ids of the tokens that are spelled like an end.

    is_control(id): whether the file says that this is a control token; is_merged(text): whether
    merges make this token, so that ordinary text has it.
    """
    candidates = [i for i, text in enumerate(tokens) if text in END_MARKS]
    candidates = [i for i in candidates if is_control(i) or not is_merged(tokens[i])]
    spellings = {tokens[i] for i in candidates}
    no_ends = set()
    if any(spellings >= marks for marks in _ONE_OF_SEVERAL):
        no_ends.add("<|end|>")
    if "<eos>" in spellings:  # Gemma's vocabularies have HTML's tags: </s> ends struck-out text
        no_ends.update(tokens[i] for i in candidates if tokens[i] == "</s>" and not is_control(i))
    return frozenset(i for i in candidates if tokens[i] not in no_ends)
