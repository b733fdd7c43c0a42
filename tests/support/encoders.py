"""Small random encoders with a WordPiece tokenizer, for embeddings and reranking."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = ["the", "a", "cat", "sat", "on", "mat", "world", "hello", "paris", "is", "capital", "of", "france", "rain"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 66,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def write_tokenizer(path: Path, *, pairs: bool = True) -> int:
    """A lower-casing WordPiece tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL, *letters, *string.punctuation, *(f"##{each}" for each in letters), *WORDS]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if pairs else None,
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")},
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(path)
    return len(vocab)


def write_encoder(path: Path, kind: str = "BertModel", **changes: Any) -> Path:
    """Write a random checkpoint of a class of transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    family = kind.removesuffix("Model").removesuffix("ForSequenceClassification").removesuffix("ForMaskedLM")
    vocab = write_tokenizer(path)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "vocab_size": vocab, **changes})
    getattr(transformers, kind)(config).save_pretrained(path)
    return path


def write_sentence_files(
    path: Path,
    *,
    pooling: Mapping[str, Any] | None = None,
    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    **files: Mapping[str, Any],
) -> Path:
    """Write what sentence-transformers keeps beside a checkpoint: `sentence_bert_config`, for one, as a keyword."""
    listed = [
        {"idx": index, "name": str(index), "path": f"{index}_{name}" if index else "", "type": f"a.models.{name}"}
        for index, name in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    for name, fields in files.items():
        (path / f"{name}.json").write_text(json.dumps(fields))
    return path
