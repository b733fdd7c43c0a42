"""Token ids in the files of a checkpoint: to list them, and to replace them by new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["named_ids", "renumber_config", "renumber_tokenizer"]

# Lists of ids that may name a dropped token, which then cannot come up any more.
UNWANTED_IDS = ("suppress_tokens", "begin_suppress_tokens")


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
