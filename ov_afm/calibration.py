"""Calibration data: text that runs through the model so that quantizers see real activations.

A `.txt` file is cut into samples; each line of a `.jsonl` file is one sample, either `{"text": ...}`
or `{"messages": [...]}`, which is rendered with the model's own chat template. The names are those
that Optimum-Intel and NNCF use; they are fetched from the Hub and need the `datasets` package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CompressionError, ConfigError
from .manifest import sha256

__all__ = ["NAMED", "describe", "model_inputs", "token_samples"]

# name → (dataset id, configuration, split, column), as in optimum-intel's PREDEFINED_LANGUAGE_DATASETS.
NAMED = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "gsm8k": ("openai/gsm8k", "main", "train", "question"),
}
SAMPLE_TOKENS = 256
# Fewer tokens than this in all say nothing about a model's activations.
MINIMUM_TOKENS = 32


def check(dataset: str) -> None:
    """Refuse a dataset that cannot be read, before any work is done.

    Raises:
        ConfigError: It is neither a readable `.txt` or `.jsonl` file nor a known name.
    """
    if dataset in NAMED:
        return
    path = Path(dataset)
    if path.suffix not in (".txt", ".jsonl"):
        msg = f"dataset {dataset!r} is unknown; give a .txt or .jsonl file, or one of {', '.join(NAMED)}"
        raise ConfigError(msg)
    if not path.is_file():
        msg = f"no such calibration file: {dataset}"
        raise ConfigError(msg)


def describe(dataset: str) -> dict[str, str]:
    """Name and sha256 of calibration data, for the manifest; no path of the user's machine."""
    return {"name": dataset} if dataset in NAMED else {"name": Path(dataset).name, "sha256": sha256(Path(dataset))}


def token_samples(dataset: str, tokenizer: Any, count: int) -> list[list[int]]:
    """Up to `count` samples of up to 256 token ids each.

    Args:
        dataset: File or name, see the module.
        tokenizer: A transformers tokenizer.
        count: Samples wanted; fewer where the data has no more.

    Raises:
        CompressionError: The data is empty, too short or malformed.
    """
    samples: list[list[int]] = []
    for text in _texts(dataset, tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut = [ids[start : start + SAMPLE_TOKENS] for start in range(0, len(ids), SAMPLE_TOKENS)]
        # The last shred of a long text would only add noise to the statistics.
        samples += cut[:-1] if len(cut) > 1 and len(cut[-1]) < MINIMUM_TOKENS else cut
        if len(samples) >= count:
            break
    total = sum(map(len, samples[:count]))
    if total < MINIMUM_TOKENS:
        msg = f"calibration data {Path(dataset).name} holds {total} tokens; at least {MINIMUM_TOKENS} are needed"
        raise CompressionError(msg)
    return samples[:count]


def model_inputs(ids: list[int], names: set[str]) -> dict[str, Any]:
    """Inputs of a stateful decoder IR for one sample, those of them that the IR has."""
    import numpy as np

    inputs = {
        "input_ids": np.array([ids], dtype=np.int64),
        "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    return {name: value for name, value in inputs.items() if name in names}


def _texts(dataset: str, tokenizer: Any) -> Iterator[str]:
    if dataset in NAMED:
        yield from _named(dataset)
        return
    path = Path(dataset)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        msg = f"calibration file {path.name} is not UTF-8 text (byte {error.start})"
        raise CompressionError(msg) from error
    if path.suffix == ".txt":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "messages" in record:
                messages = [{"role": turn["role"], "content": str(turn["content"])} for turn in record["messages"]]
                yield tokenizer.apply_chat_template(messages, tokenize=False)
            else:
                yield str(record["text"])
        except (ValueError, KeyError, TypeError) as error:
            msg = f'{path.name} line {number} is neither {{"text": ...}} nor {{"messages": [...]}} ({error!r})'
            raise CompressionError(msg) from error


def _named(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        msg = f"dataset {name!r} needs the datasets package; run: pip install datasets, or give a .txt or .jsonl file"
        raise CompressionError(msg) from error
    identifier, configuration, split, column = NAMED[name]
    try:
        rows = load_dataset(identifier, configuration, split=split, streaming=True)
        for row in rows:
            if row[column].strip():
                yield row[column]
    except (OSError, ValueError) as error:
        msg = f"dataset {name!r} cannot be fetched ({error}); give a .txt or .jsonl file instead"
        raise CompressionError(msg) from error
