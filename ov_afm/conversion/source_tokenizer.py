"""The tokenizer of a checkpoint, of whichever files it consists.

A `tokenizer.model` alone is a SentencePiece vocabulary, which transformers reads only with the sentencepiece package,
and then without its scores. Here it becomes a `tokenizer.json` that is proved against SentencePiece's own rule (see
`sentence_pieces`); what that rule does beyond it, such as normalization, is refused by name.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import SourceError
from ..model_dir.hf_tokenizer import load_hf_tokenizer
from ..system.atomic import write_json
from . import sentence_pieces
from .checkpoint import read_json
from .sentence_pieces import NORMAL, UNUSED, Pieces, Prefix

__all__ = ["check_rows", "load"]

MODEL, CONFIG = "tokenizer.model", "tokenizer_config.json"
ADDED = "added_tokens.json"
BESIDE = ("special_tokens_map.json", "chat_template.jinja")
UNIGRAM, BPE = 1, 2
# Settings of transformers' own class, which `tokenizer.json` says now.
OF_THE_CLASS = ("legacy", "sp_model_kwargs", "add_prefix_space", "add_bos_token", "add_eos_token")
HELP = "save it with transformers (save_pretrained) and copy tokenizer.json beside it"


def load(checkpoint: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint in transformers.

    Raises:
        SourceError: It consists of a `tokenizer.model` alone, which needs what cannot be done here.
    """
    others = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not (checkpoint / MODEL).is_file() or any(all((checkpoint / n).is_file() for n in names) for names in others):
        return load_hf_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    with TemporaryDirectory() as folder:
        _write(checkpoint, Path(folder))
        return load_hf_tokenizer(Path(folder))


def check_rows(tokenizer: Any, rows: int, where: str) -> None:
    """Refuse a tokenizer that gives tokens for which the embedding has no row.

    Text can hold each of them, padding tokens too, and a prompt with one of them fails.

    Raises:
        SourceError: Names the first one.
    """
    beyond = sorted((index, text) for text, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        index, text = beyond[0]
        raise SourceError(
            f"the tokenizer of {where} has {len(beyond)} tokens beyond the {rows} rows of the embedding, the first is "
            f"{text!r} ({index}), and a prompt with it would fail; take them out of the tokenizer files, or give the "
            "model rows for them (transformers: resize_token_embeddings)",
            code="tokens-beyond-embedding",
        )


def _write(checkpoint: Path, folder: Path) -> None:
    """Write a `tokenizer.json` for a SentencePiece vocabulary, and what lies beside it."""
    path = checkpoint / MODEL
    config = read_json(checkpoint / CONFIG) if (checkpoint / CONFIG).is_file() else {}
    try:
        model = _Model.read(path.read_bytes())
        problem = next(model.problems(), None)
    except (ValueError, IndexError, struct.error):
        problem = "is no SentencePiece model (one in tiktoken's form has no rule for cutting text)"
    if problem is not None:
        raise SourceError(f"{path} {problem}; {HELP}", code="tokenizer-unsupported")
    try:
        tokenizer = sentence_pieces.build(Pieces(model.texts, model.scores, model.types, _prefix(model, config)))
        _add_tokens(tokenizer, read_json(checkpoint / ADDED) if (checkpoint / ADDED).is_file() else {})
    except ValueError as error:
        raise SourceError(
            f"{path} cannot be expressed in tokenizer.json ({error}); {HELP}", code="tokenizer-unsupported"
        ) from error
    special = {name: model.texts[index] for name, index in model.special.items() if 0 <= index < len(model.texts)}
    _add_edges(tokenizer, config, special)
    tokenizer.save(str(folder / "tokenizer.json"))
    kept = {key: value for key, value in config.items() if key not in OF_THE_CLASS}
    write_json(folder / CONFIG, {**special, **kept, "tokenizer_class": "PreTrainedTokenizerFast"})
    for name in BESIDE:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


@dataclass(frozen=True)
class _Model:
    """What is read of a `tokenizer.model`.

    Attributes:
        texts: Of the pieces.
        scores: Of the pieces.
        types: Of the pieces.
        special: Ids of `bos_token`, `eos_token` and `unk_token`.
        trainer: Fields of its `trainer_spec`, by number.
        normalizer: Fields of its `normalizer_spec`, by number.
    """

    texts: list[str]
    scores: list[float]
    types: list[int]
    special: dict[str, int]
    trainer: Mapping[int, Any]
    normalizer: Mapping[int, Any]

    @classmethod
    def read(cls, data: bytes) -> _Model:
        """Read the protocol buffer (sentencepiece_model.proto in google/sentencepiece, which has the defaults too).

        Raises:
            ValueError: It is none.
            IndexError: It is cut short.
            struct.error: It is cut short.
        """
        pieces, parts = [], {2: b"", 3: b""}
        for number, value in _fields(data):
            if number == 1:
                pieces.append(dict(_fields(value)))
            elif number in parts:
                parts[number] = value
        if not pieces:
            raise ValueError("no pieces")
        trainer, normalizer = (dict(_fields(part)) for part in parts.values())
        special = {"unk_token": trainer.get(40, 0), "bos_token": trainer.get(41, 1), "eos_token": trainer.get(42, 2)}
        return cls(
            texts=[piece[1].decode("utf-8") if 1 in piece else "" for piece in pieces],
            scores=[struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0 for piece in pieces],
            types=[piece.get(3, NORMAL) for piece in pieces],
            special=special,
            trainer=trainer,
            normalizer=normalizer,
        )

    def problems(self) -> Iterator[str]:
        """What it needs beyond pieces and scores, for people."""
        if self.trainer.get(3, UNIGRAM) != BPE:
            yield "is no BPE of SentencePiece, and OpenVINO's tokenizer would cut text otherwise"
        if self.normalizer.get(2):
            yield f"rewrites text first (normalization {self.normalizer.get(1, b'').decode('utf-8', 'replace')})"
        if self.normalizer.get(4, True):
            yield "removes spaces (remove_extra_whitespaces)"
        if not self.normalizer.get(5, True) or self.trainer.get(24, False):
            yield "keeps spaces otherwise than before words"
        if UNUSED in self.types:
            yield "has unused pieces"


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: integers, bytes of strings and messages, bytes of floats."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number is too long")

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else 0)
        if not size and wire != 2:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("cut short")
        yield number, data[at : at + size]
        at += size


def _prefix(model: _Model, config: Mapping[str, Any]) -> Prefix:
    if not config.get("add_prefix_space", model.normalizer.get(3, True)):
        return "never"
    return "first" if config.get("legacy") is False else "always"


def _add_tokens(tokenizer: Any, added: Mapping[str, Any]) -> None:
    """Add the tokens of `added_tokens.json`, which transformers reads no more for such a tokenizer.

    Raises:
        ValueError: Their ids do not follow those of the vocabulary.
    """
    from tokenizers import AddedToken

    for text, index in sorted(added.items(), key=lambda item: str(item[1]).zfill(12)):
        if tokenizer.token_to_id(text) == index:
            continue
        if index != tokenizer.get_vocab_size():
            raise ValueError(f"{text!r} of {ADDED} has id {index}, and {tokenizer.get_vocab_size()} is the next one")
        tokenizer.add_tokens([AddedToken(text, normalized=False)])


def _add_edges(tokenizer: Any, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Begin a text with BOS unless the configuration says otherwise, as transformers' class for Llama does."""
    from tokenizers import processors

    def text_of(name: str, added: bool) -> list[str]:
        value = config.get(f"{name}_token", special.get(f"{name}_token"))
        text = value.get("content") if isinstance(value, dict) else value
        return [text] if added and text is not None else []

    head = text_of("bos", config.get("add_bos_token", True))
    tail = text_of("eos", config.get("add_eos_token", False))
    ids = {text: tokenizer.token_to_id(text) for text in (*head, *tail)}
    if ids and None not in ids.values():
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*head, "$A", *tail], special_tokens=list(ids.items())
        )
