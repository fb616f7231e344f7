"""Writes the files beside the graphs: the tokenizer's, and the settings of onnxruntime-genai.

    tokenizer.json         an object of the package `tokenizers`. An added token that is `special`
                           is a control token; other added tokens are user-defined, ordinary text.
                           The normalizer `Prepend` is SentencePiece's space before a text.
    tokenizer_config.json  add_bos_token: encoding begins with bos, even if the post_processor adds
                           none; bos_token, eos_token: their spelling; chat_template
    genai_config.json      of dialect cpu. model.eos_token_id: all tokens that end a turn;
                           model.context_length: the positions in the graph's tables

`tokenizer.json` and `tokenizer_config.json` belong to both dialects.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edge.graph.graph import Graph
from edge.tokenizer.backend import build
from edge.tokenizer.pieces import SPM_SPACE
from edge.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    import tokenizers

    from edge.files.gguf import GGUF
    from edge.models.common import Config

__all__ = ["GENAI", "TOKENIZER_FILES", "complete_tokenizer", "write_genai", "write_tokenizer"]

GENAI = "genai_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

#: onnxruntime-genai's name for a decoder of any architecture.
_TYPE = "decoder"


def write_tokenizer(model: GGUF, config: Config, folder: Path) -> Vocabulary:
    """Write the tokenizer's files; returns the vocabulary that is in them.

    Raises ModelFileError, UnsupportedError as `Tokenizer.from_metadata`; OSError.
    """
    vocabulary = Vocabulary.from_metadata(model.metadata, model.path)
    tokenizer, settings = (folder / name for name in TOKENIZER_FILES)
    _write_text(tokenizer, complete_tokenizer(vocabulary).to_str())
    values = {
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": False,
        "bos_token": _spelling(vocabulary, vocabulary.bos_id),
        "chat_template": model.metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": _spelling(vocabulary, vocabulary.eos_id),
        "model_max_length": config.n_context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(settings, {key: value for key, value in values.items() if value is not None})
    return vocabulary


def write_genai(
    graph: Graph, config: Config, vocabulary: Vocabulary, folder: Path, filename: str
) -> None:
    """Write genai_config.json. filename: of the graph that `cpu` writes. Raises OSError."""
    ends = sorted(vocabulary.end_ids, key=lambda i: (i != vocabulary.eos_id, i))
    past, present = "past_key_values.%d", "present.%d"
    decoder = {
        "filename": filename,
        "head_size": config.heads[0].head_dim,
        "hidden_size": config.dim,
        "inputs": {
            "attention_mask": "attention_mask",
            "input_ids": "input_ids",
            "past_key_names": f"{past}.key",
            "past_value_names": f"{past}.value",
        },
        "num_attention_heads": config.heads[0].n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.heads[0].n_kv_heads,
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{present}.key",
            "present_value_names": f"{present}.value",
        },
        "session_options": {"provider_options": []},
    }
    model = {
        "bos_token_id": vocabulary.bos_id,
        "context_length": config.n_context,
        "decoder": decoder,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if ends else 0,
        "type": _TYPE,
        "vocab_size": graph.dims[graph.output],
    }
    search = {"max_length": config.n_context, "past_present_share_buffer": True}
    known = {key: value for key, value in model.items() if value is not None}
    write_json(folder / GENAI, {"model": known, "search": search})


def write_json(path: Path, value: Any) -> None:
    """Write a file of indented JSON. Raises OSError."""
    _write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def complete_tokenizer(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The object of tokenizer.json, which reads control tokens in a text as such.

    It has a decoder to text and adds bos. edge does both itself, but other programs read them from
    the file.
    """
    from tokenizers import decoders, processors

    backend = build(vocabulary).marked
    if vocabulary.is_spm:
        steps = [decoders.Replace(SPM_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if vocabulary.space_prefix:
            steps.append(decoders.Strip(" ", 1, 0))
        backend.decoder = decoders.Sequence(steps)
    else:
        backend.decoder = decoders.ByteLevel()
    if vocabulary.add_bos and vocabulary.bos_id is not None:
        bos = vocabulary.tokens[vocabulary.bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary.bos_id)]
        )
    return backend


def _spelling(vocabulary: Vocabulary, token: int | None) -> str | None:
    return None if token is None else vocabulary.tokens[token]


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
