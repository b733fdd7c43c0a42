"""Calibration data: text that runs through the model so that quantizers see real activations.

Data is one source or several with weights, `a.jsonl:0.6,b.txt:0.4`. A source is

- a `.txt` file: its paragraphs;
- a `.jsonl` file: each line `{"text": ...}`, or `{"messages": [...]}`, which the model's own chat template renders;
- `packaged`: technical prose that comes with ov_afm;
- `self`: what the model that is compressed writes when only its chat template is given (`self_generated`);
- `wikitext2`, `c4`, `gsm8k`: from the Hub, with the `datasets` package.

Duplicates, near duplicates and degenerate text are dropped, the rest is packed into samples of 256 tokens, and the
result is cached under the sha256 of all that went in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CompressionError, ConfigError
from ..model_dir.manifest import sha256
from ..system.atomic import write_json
from ..system.json_text import parse
from ..system.paths import cache_dir
from .text_filter import Cleaner

__all__ = ["PACKAGED", "SELF", "check", "describe", "files", "parts", "prepare", "whole_samples"]

# name → (dataset id, configuration, split, column), as in optimum-intel's PREDEFINED_LANGUAGE_DATASETS.
NAMED = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "gsm8k": ("openai/gsm8k", "main", "train", "question"),
}
PACKAGED = "packaged"
SELF = "self"
# Sections of The Rust Programming Language, see data/README.md for its licence.
PACKAGED_TEXT = Path(__file__).parent / "data" / "calibration.txt"
SAMPLE_TOKENS = 256
# With fewer tokens in all, activations say nothing about the model.
MINIMUM_TOKENS = 32
CACHE_LAYOUT = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One source of a mixture.

    Attributes:
        name: File, or one of the names of the module.
        weight: Its share of the tokens, relative to the others'.
    """

    name: str
    weight: float

    @property
    def path(self) -> Path | None:
        """Its file; None where it has none."""
        if self.name == PACKAGED:
            return PACKAGED_TEXT
        return None if self.name == SELF or self.name in NAMED else Path(self.name)

    def describe(self) -> dict[str, str]:
        """Name and sha256, without a path of the user's machine."""
        path = self.path
        return {"name": self.name} if path is None else {"name": path.name, "sha256": sha256(path)}


def parts(dataset: str) -> list[Part]:
    """The sources of a mixture.

    Raises:
        ConfigError: A weight is not a positive number, or a source is named twice.
    """
    sources = []
    for item in dataset.split(","):
        name, _, weight = item.rpartition(":")
        try:
            part = Part(name, float(weight)) if name else Part(item, 1.0)
        except ValueError:  # such as `C:\data.txt`
            part = Part(item, 1.0)
        if not 0 < part.weight < float("inf"):
            raise ConfigError(f"the weight of calibration source {name} must be positive, found {weight}")
        sources.append(part)
    names = [part.name for part in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"a calibration source is named twice in {dataset!r}; name each once, with its weight")
    return sources


def files(dataset: str | None) -> list[Path]:
    """The user's files in a mixture; none where there is no data."""
    own = parts(dataset) if dataset is not None else []
    return [part.path for part in own if part.path not in (None, PACKAGED_TEXT)]


def check(dataset: str) -> None:
    """Refuse data that cannot be read, before any work is done.

    Raises:
        ConfigError: A source is neither a readable `.txt` or `.jsonl` file nor a known name.
    """
    for part in parts(dataset):
        if part.name in (PACKAGED, SELF, *NAMED):
            continue
        path = Path(part.name)
        if path.suffix not in (".txt", ".jsonl"):
            names = ", ".join((PACKAGED, SELF, *NAMED))
            raise ConfigError(
                f"dataset {part.name!r} is unknown; give a .txt or .jsonl file, or one of {names}",
                code="dataset-unknown",
            )
        if not path.is_file():
            raise ConfigError(f"no such calibration file: {part.name}", code="dataset-missing")


def describe(dataset: str) -> dict[str, str]:
    """Name and sha256 of calibration data, for the manifest; no path of the user's machine."""
    sources = parts(dataset)
    if len(sources) == 1:
        return sources[0].describe()
    records = [{**part.describe(), "weight": part.weight} for part in sources]
    name = ",".join(f"{record['name']}:{record['weight']:g}" for record in records)
    return {"name": name, "sha256": _digest(records)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def prepare(
    dataset: str, tokenizer: Any, count: int, *, ir: Path | None = None
) -> tuple[list[list[int]], dict[str, Any]]:
    """Samples of 256 token ids, and what was kept.

    Args:
        dataset: Sources, see the module.
        tokenizer: A transformers tokenizer.
        count: Most samples; fewer where the data has no more.
        ir: The model's `openvino_model.xml`, for `self`.

    Returns:
        The samples; `name`, `sha256`, `samples`, `tokens`, and for each source what was read, dropped and kept.

    Raises:
        CompressionError: The data is empty, too short or malformed.
    """
    chosen = parts(dataset)
    state: list[Any] = [CACHE_LAYOUT, count, [[part.describe(), part.weight] for part in chosen]]
    state += [hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(), tokenizer.chat_template]
    if ir is not None and any(part.name == SELF for part in chosen):
        state.append(sha256(ir.with_suffix(".bin")))
    path = cache_dir() / "calibration" / f"{_digest(state)[:32]}.json"
    if path.is_file():
        content = parse(path.read_text(encoding="utf-8"))
    else:
        content = _make(chosen, tokenizer, count, ir)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content, indent=None)
    samples: list[list[int]] = content["samples"]
    counts = {"samples": len(samples), "tokens": sum(map(len, samples))}
    return samples, {**describe(dataset), **counts, "sources": content["sources"]}


def whole_samples(dataset: str, tokenizer: Any, count: int) -> tuple[list[list[int]], dict[str, Any]]:
    """`prepare`, with those samples alone that have all 256 tokens, so that they stack; the first where none has."""
    samples, description = prepare(dataset, tokenizer, count)
    return [sample for sample in samples if len(sample) == SAMPLE_TOKENS] or samples[:1], description


def _make(chosen: list[Part], tokenizer: Any, count: int, ir: Path | None) -> dict[str, Any]:
    samples: list[list[int]] = []
    records: list[dict[str, Any]] = []
    cleaner = Cleaner()
    whole = sum(part.weight for part in chosen)
    for part in chosen:
        # At least one sample of each source, and together no more than `count`.
        share = max(1, round(count * part.weight / whole))
        cleaner.reset()
        ids = _pack(cleaner.keep(_documents(part, tokenizer, share, ir)), tokenizer, share)
        samples += ids
        name = part.name if part.path is None else part.path.name
        records.append({"name": name, "weight": part.weight, "samples": len(ids), **cleaner.counts})
    samples = samples[:count]
    total = sum(map(len, samples))
    if total < MINIMUM_TOKENS:
        names = ", ".join(record["name"] for record in records)
        message = f"calibration data {names} holds {total} tokens; at least {MINIMUM_TOKENS} are needed"
        dropped = sum(record["duplicates"] + record["near_duplicates"] + record["degenerate"] for record in records)
        if dropped:
            message += f" ({dropped} pieces of text were dropped as duplicates or degenerate)"
        raise CompressionError(message, code="dataset-too-short")
    return {"samples": samples, "sources": records}


def _pack(texts: Iterator[str], tokenizer: Any, count: int) -> list[list[int]]:
    """Cut a stream of texts into samples; a last one of less than half the length is dropped if there are others."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(stream) >= count * SAMPLE_TOKENS:
            break
    samples = [stream[start : start + SAMPLE_TOKENS] for start in range(0, len(stream), SAMPLE_TOKENS)]
    if len(samples) > 1 and len(samples[-1]) < SAMPLE_TOKENS // 2:
        samples.pop()
    return samples[:count]


def _documents(part: Part, tokenizer: Any, count: int, ir: Path | None) -> Iterator[str]:
    path = part.path
    if part.name == SELF:
        if ir is None:
            raise CompressionError(
                "calibration data `self` needs the uncompressed model, which is not at hand here; give a file"
            )
        from .self_generated import sample_texts

        yield from sample_texts(ir, tokenizer, count, SAMPLE_TOKENS)
    elif path is None:
        yield from _named(part.name)
    else:
        yield from _file(path, tokenizer)


def _file(path: Path, tokenizer: Any) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CompressionError(f"calibration file {path.name} is not UTF-8 text (byte {error.start})") from error
    if path.suffix == ".txt":
        yield from (f"{paragraph}\n\n" for paragraph in content.split("\n\n") if paragraph.strip())
        return
    render: Callable[..., str] = tokenizer.apply_chat_template
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = parse(line)
            if "messages" in record:
                messages = [{"role": turn["role"], "content": str(turn["content"])} for turn in record["messages"]]
                yield render(messages, tokenize=False)
            else:
                yield str(record["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise CompressionError(
                f'{path.name} line {number} is neither {{"text": ...}} nor {{"messages": [...]}} ({error!r})'
            ) from error


def _named(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CompressionError(
            f"dataset {name!r} needs the datasets package; run: pip install datasets, or give a .txt or .jsonl file"
        ) from error
    identifier, configuration, split, column = NAMED[name]
    try:
        rows = load_dataset(identifier, configuration, split=split, streaming=True)
        for row in rows:
            if row[column].strip():
                yield row[column]
    except (OSError, ValueError) as error:
        raise CompressionError(
            f"dataset {name!r} cannot be fetched ({error}); give a .txt or .jsonl file instead"
        ) from error
