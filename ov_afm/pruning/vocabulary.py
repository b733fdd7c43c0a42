"""Remove the vocabulary rows of scripts that the user does not keep.

A token of a byte-level BPE is a sequence of bytes. It is dropped if they hold a whole letter of a dropped script.
Single bytes, parts of characters and added tokens stay, so that every text can still be written: a text in a dropped
script takes more tokens, every other text keeps its tokens. That holds because UTF-8 marks where a character begins, so
that no token of such a text holds a dropped letter; and because the parts of a token that stays hold no other letters
than the token, so that they stay too, with the merges that join them.

A script is the first word of a letter's Unicode name: LATIN, GREEK, CYRILLIC, CJK, HANGUL.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conversion import source_tokenizer
from ..conversion.checkpoint import read_json
from ..conversion.synthetic import byte_alphabet
from ..conversion.tensors import load
from ..errors import CompressionError, ConfigError, SourceError
from ..system.atomic import write_json
from ..system.child_process import Progress, emit
from .checkpoint import check_finite, copy_texts

__all__ = ["Cut", "choose", "cut_checkpoint", "plan_cut", "renumber_config", "renumber_tokenizer", "select_rows"]

# Lists of ids that may name a dropped token, which then cannot come up any more.
UNWANTED_IDS = ("suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True, slots=True)
class Cut:
    """Which rows of embedding and head stay.

    Attributes:
        rows: Their old ids, ascending; the place of one is its new id.
        before: Rows of the source.
        scripts: What is kept.
        dropped: Tokens dropped, by the first dropped script in each, largest number first.
        unused: Rows dropped that belong to no token and only pad the matrix.
    """

    rows: tuple[int, ...]
    before: int
    scripts: tuple[str, ...]
    dropped: dict[str, int]
    unused: int

    def to_dict(self) -> dict[str, Any]:
        """As the report records it."""
        return {
            "scripts": list(self.scripts),
            "rows": {"before": self.before, "after": len(self.rows)},
            "tokens_dropped": self.dropped,
            "unused_rows_dropped": self.unused,
        }


def plan_cut(checkpoint: Path, config: Mapping[str, Any], scripts: Sequence[str]) -> Cut:
    """Which rows of a checkpoint stay.

    Args:
        checkpoint: Its folder.
        config: Contents of its `config.json`.
        scripts: Names of scripts to keep, in any case.

    Raises:
        CompressionError: The tokenizer is no byte-level BPE.
        ConfigError: No token has a letter of a script.
        SourceError: A token has no row, or the tokenizer cannot be read.
    """
    named = named_ids(config)
    if (checkpoint / "generation_config.json").is_file():
        named |= named_ids(read_json(checkpoint / "generation_config.json"))
    return choose(_fields(_tokenizer(checkpoint), checkpoint.name), int(config["vocab_size"]), scripts, named)


def _tokenizer(checkpoint: Path) -> Any:
    try:
        return source_tokenizer.load(checkpoint)
    except (ValueError, OSError) as error:
        raise SourceError(f"the tokenizer of {checkpoint} cannot be read: {error}") from error


def _fields(tokenizer: Any, name: str) -> dict[str, Any]:
    """What `tokenizer.json` holds once transformers has read all files of a tokenizer.

    Raises:
        CompressionError: It is no byte-level BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    fields: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model, decoder = fields.get("model") or {}, fields.get("decoder") or {}
    decoders = [decoder.get("type"), *(each.get("type") for each in decoder.get("decoders", ()))]
    marks = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") != "BPE" or "ByteLevel" not in decoders or marks:
        raise CompressionError(
            f"--keep-scripts takes byte-level BPE tokenizers (tokenizer.json), which that of {name} is not"
        )
    return fields


def _scripts_of(token: str, letters: Mapping[str, int]) -> list[str]:
    """Scripts of the whole letters in a token, in their order."""
    text = bytes(letters[each] for each in token).decode("utf-8", "ignore")
    return [unicodedata.name(each, "UNNAMED").split()[0] for each in text if unicodedata.category(each).startswith("L")]


def choose(tokenizer: Mapping[str, Any], rows: int, scripts: Sequence[str], named: Collection[int] = ()) -> Cut:
    """Which rows of a vocabulary stay.

    Args:
        tokenizer: Contents of the `tokenizer.json` of a byte-level BPE.
        rows: Rows of the embedding.
        scripts: Names of scripts to keep, in any case.
        named: Ids that a configuration names, which stay in any case.

    Raises:
        CompressionError: A token is not spelt in bytes, or a byte is no token of its own.
        ConfigError: No token has a letter of a script.
        SourceError: A token has no row.
    """
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {index: token for token, index in vocabulary.items()} | added
    if max(tokens) >= rows:
        raise SourceError(f"token {tokens[max(tokens)]!r} has the id {max(tokens)}, but the embedding has {rows} rows")
    letters = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    kept_scripts = {script.upper() for script in scripts}
    present: Counter[str] = Counter()
    dropped: dict[int, str] = {}
    for index, token in tokens.items():
        if index in added:
            continue
        if not letters.keys() >= set(token):
            raise CompressionError(
                f"token {token!r} is not spelt in bytes; --keep-scripts takes byte-level BPE tokenizers"
            )
        of_token = _scripts_of(token, letters)
        present.update(set(of_token))
        others = [script for script in of_token if script not in kept_scripts]
        if others and len(token) > 1 and index not in named:
            dropped[index] = others[0]
    if unknown := sorted(kept_scripts - present.keys()):
        existing = ", ".join(script for script, _ in present.most_common())
        raise ConfigError(f"no token has a letter of {', '.join(unknown)}; the vocabulary has {existing}")
    if not vocabulary.keys() >= set("".join(tokens[index] for index in dropped)):
        raise CompressionError(
            "a byte of the tokens to drop is no token of its own, so that their text could not be written any more"
        )
    kept = sorted((tokens.keys() - dropped.keys()) | {index for index in named if 0 <= index < rows})
    counts = dict(Counter(dropped.values()).most_common())
    return Cut(tuple(kept), rows, tuple(sorted(kept_scripts)), counts, rows - len(kept) - len(dropped))


def cut_checkpoint(source: Path, output: Path, rows: Sequence[int]) -> None:
    """Write a checkpoint with some of the rows of embedding and head, and a tokenizer to match.

    Args:
        source: The checkpoint.
        output: Folder of the new one.
        rows: As `Cut.rows`.

    Raises:
        CompressionError: A weight is not finite, or the new tokenizer does not have the tokens that it should.
    """
    model = load(source).model
    check_finite(model)
    select_rows(model, rows)
    emit(Progress(1, 2))
    tokenizer = _tokenizer(source)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    copy_texts(source, output)
    new = {old: index for index, old in enumerate(rows)}
    _write_tokenizer(output, _fields(tokenizer, output.name), new, tokenizer.get_vocab())
    for name in ("config.json", "generation_config.json"):
        if (output / name).is_file():
            write_json(output / name, renumber_config(read_json(output / name), new))
    emit(Progress(2, 2))


def select_rows(model: Any, rows: Sequence[int]) -> None:
    """Keep some rows of a model's embedding and head, tied or not, in place."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    index = torch.tensor(rows)
    embedding.weight = torch.nn.Parameter(embedding.weight.detach()[index], requires_grad=False)
    head.weight = embedding.weight if tied else torch.nn.Parameter(head.weight.detach()[index], requires_grad=False)
    # The row that training leaves alone; its old id would be wrong.
    embedding.padding_idx = None
    embedding.num_embeddings = head.out_features = model.config.vocab_size = len(rows)


def _write_tokenizer(
    folder: Path, fields: dict[str, Any], new: Mapping[int, int], vocabulary: Mapping[str, int]
) -> None:
    """Write tokenizer.json with new ids; `vocabulary` is what the old one has, added tokens included."""
    from tokenizers import Tokenizer

    renumbered = Tokenizer.from_str(json.dumps(renumber_tokenizer(fields, new)))
    if renumbered.get_vocab() != {token: new[index] for token, index in vocabulary.items() if index in new}:
        raise CompressionError(
            "the tokenizer cannot be renumbered: its added tokens take ids of their own; leave --keep-scripts out"
        )
    renumbered.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    content = read_json(path)
    if "added_tokens_decoder" in content:
        entries = content["added_tokens_decoder"].items()
        content["added_tokens_decoder"] = {str(new[int(index)]): token for index, token in entries}
        write_json(path, content)


# -- Token ids in the files of a checkpoint: to list them, and to replace them by new ones


def renumber_tokenizer(fields: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Contents of a `tokenizer.json` with new ids.

    Args:
        fields: The old contents.
        new: Old id to new id, for every token that stays.
    """
    model = fields["model"]
    vocabulary = {token: new[index] for token, index in model["vocab"].items() if index in new}

    def stays(merge: str | list[str]) -> bool:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        return all(token in vocabulary for token in (*parts, "".join(parts)))

    padding = fields.get("padding")
    return {
        **fields,
        "model": {**model, "vocab": vocabulary, "merges": [merge for merge in model["merges"] if stays(merge)]},
        "added_tokens": [{**token, "id": new[token["id"]]} for token in fields["added_tokens"]],
        "post_processor": _renumber_processor(fields.get("post_processor"), new),
        "padding": {**padding, "pad_id": new[padding["pad_id"]]} if padding else padding,
    }


def _renumber_processor(processor: dict[str, Any] | None, new: Mapping[int, int]) -> dict[str, Any] | None:
    """A post-processor, of any of the kinds that `tokenizers` has, with new ids."""
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in changed:
        changed["processors"] = [_renumber_processor(each, new) for each in changed["processors"]]
    if "special_tokens" in changed:
        changed["special_tokens"] = {
            name: {**token, "ids": [new[index] for index in token["ids"]]}
            for name, token in changed["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if name in changed:
            token, index = changed[name]
            changed[name] = [token, new[index]]
    return changed


def named_ids(config: Mapping[str, Any]) -> set[int]:
    """Ids that a configuration names; a negative one means none."""
    values = [value for key, value in config.items() if key.endswith("_token_id") and value is not None]
    ids = [index for value in values for index in (value if isinstance(value, list) else [value])]
    return {index for index in ids if index >= 0}


def renumber_config(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Contents of a `config.json` or `generation_config.json` with new ids.

    Args:
        config: The old contents.
        new: Old id to new id, for every row that stays.
    """
    changed = dict(config)
    for key, value in config.items():
        if key == "vocab_size":
            changed[key] = len(new)
        elif key.endswith("_token_id") and value is not None:
            # An id that is no row, such as -1, stays what it is.
            changed[key] = (
                [new.get(index, index) for index in value] if isinstance(value, list) else new.get(value, value)
            )
        elif key in UNWANTED_IDS and value is not None:
            changed[key] = [new[index] for index in value if index in new]
        elif key == "bad_words_ids" and value is not None:
            changed[key] = [[new[index] for index in word] for word in value if all(index in new for index in word)]
    return changed
