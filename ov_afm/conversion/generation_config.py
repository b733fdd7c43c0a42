"""The source's `generation_config.json` in the model directory: as it is, with only what it lacks added.

transformers loses the whole file when a field contradicts another (`do_sample: false` with a temperature, for one), and
the ends of an answer with it. So the file does not go through transformers. Two things are added where the source says
nothing: the sampling that the makers of an architecture recommend, and stop tokens that the source names elsewhere,
because other programs than ov_afm read no other place. The manifest records what was added.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..model_dir.model_directory import read_config
from ..presets import SAMPLING
from ..runtime import chat_template, stop_tokens
from ..runtime.generation_config import FILE_NAME, NUMBERS, TOKENS, eos_ids, is_greedy, not_used, read
from ..system.atomic import write_json
from ..system.json_text import parse

__all__ = ["carry", "describe"]

# What old checkpoints have in `config.json` (`GenerationConfig.from_model_config` in transformers).
IN_CONFIG = (*TOKENS, "do_sample", *NUMBERS, "top_k", "max_new_tokens", "min_new_tokens", "stop_strings")


def carry(checkpoint: Path, output: Path) -> dict[str, Any]:
    """Write the generation configuration of a model directory, whose tokenizer and template are there already.

    Args:
        checkpoint: The source.
        output: The future model directory.

    Returns:
        The manifest's `generation`.

    Raises:
        SourceError: The source's file cannot be read, or a field is not of its type.
    """
    original, config = checkpoint / FILE_NAME, read_config(checkpoint)
    if original.exists():
        shutil.copyfile(original, output / FILE_NAME)
    added = _lacking(read(checkpoint), config, own_file=original.exists())
    _add(output, added)
    tokens = stop_tokens.of_folder(output)
    notes = _notes(tokens, read(output), int(config["vocab_size"]))
    ends = eos_ids(read(output))
    if unnamed := [token.id for token in tokens if token.id not in ends]:
        added["eos_token_id"] = unnamed if len(unnamed) > 1 or ends else unnamed[0]
        every = [*ends, *unnamed]
        _add(output, {"eos_token_id": every if len(every) > 1 else every[0]})
    return {
        "added": added,
        "stop_tokens": [token.to_dict() for token in tokens],
        "notes": [*notes, *chat_template.notes(checkpoint)],
    }


def describe(model_dir: Path) -> dict[str, Any]:
    """The manifest's `generation` of a model directory that is taken as it is."""
    tokens = stop_tokens.of_folder(model_dir)
    notes = _notes(tokens, read(model_dir), int(read_config(model_dir)["vocab_size"]))
    notes += chat_template.notes(model_dir)
    return {"added": {}, "stop_tokens": [token.to_dict() for token in tokens], "notes": notes}


def _lacking(fields: Mapping[str, Any], config: Mapping[str, Any], *, own_file: bool) -> dict[str, Any]:
    """What the source says in `config.json` alone, and what the makers of its architecture recommend beyond that."""
    names = ("eos_token_id",) if own_file else IN_CONFIG
    elsewhere = {name: config[name] for name in names if config.get(name) is not None and name not in fields}
    sampling = SAMPLING.get(config.get("model_type", ""))
    if sampling is None or is_greedy({**elsewhere, **fields}):
        return elsewhere
    recommended = {"do_sample": True, **asdict(sampling)}
    return {**{name: value for name, value in recommended.items() if name not in fields}, **elsewhere}


def _add(folder: Path, added: Mapping[str, Any]) -> None:
    """Add fields to the file of a folder; without any, it stays as it is, byte for byte."""
    path = folder / FILE_NAME
    if added or not path.exists():
        existing = parse(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, {**existing, **added})


def _notes(tokens: tuple[stop_tokens.StopToken, ...], fields: Mapping[str, Any], vocabulary: int) -> list[str]:
    notes = stop_tokens.disagreements(tokens)
    if not tokens:
        notes.append("nothing names a token that ends an answer: answers run to their limit")
    beyond = [str(token.id) for token in tokens if token.id >= vocabulary]
    if beyond:
        notes.append(f"stop token {', '.join(beyond)} is beyond the vocabulary of {vocabulary}; it never comes")
    if unused := not_used(fields):
        values = ", ".join(f"{name} {fields[name]}" for name in unused)
        notes.append(f"not used of the source's {FILE_NAME}: {values}")
    return notes
