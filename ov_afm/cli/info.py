"""What a model directory is: `ov-afm info`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..model_dir import card
from ..model_dir.manifest import FILE_NAME, files_of
from ..model_dir.model_directory import ModelDirectory, ModelResult
from ..runtime import kernel_choice, stop_tokens, text_proof
from ..runtime.properties import build
from ..system import console
from .command import command, command_parser

__all__ = ["describe", "main", "report"]

logger = logging.getLogger(__name__)


def describe(model_dir: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """The manifest of a model directory, with its sizes.

    Args:
        model_dir: The directory.
        verify: Compare the sha256 of every file, and prove tokenizer, chat template and stop tokens again.

    Raises:
        SourceError: It is no whole model directory.
    """
    folder = Path(model_dir)
    total = sum(path.stat().st_size for path in files_of(folder))
    with contextlib.ExitStack() as stack:
        advance = None
        if verify:
            progress = stack.enter_context(console.Progress())
            advance = stack.enter_context(progress.step("hashing", total=total, unit="B"))
        model = ModelDirectory.open(folder, hashes=verify, any_task=True, on_bytes=advance)
    contents = model.manifest.to_dict() if model.manifest else {"geometry": model.geometry.to_dict()}
    facts: dict[str, Any] = {
        "total_bytes": total,
        "manifest": model.manifest is not None,
        "lost_packed": model.lost_packed,
        "kernels_here": None if model.text_encoder else kernel_choice.report(model, build("CPU")),
    }
    if verify:
        facts["proved"] = text_proof.check(model) if model.manifest else {}
    geometry = contents["geometry"] or model.geometry.to_dict()
    ends = None if model.text_encoder else _ends(folder)
    shown = {"stop_tokens": ends, "edited": model.edited, **contents, "geometry": geometry}
    return {"path": str(folder), **facts, **shown}


def _ends(folder: Path) -> list[dict[str, Any]] | None:
    """The tokens that end an answer now; None where the tokenizer or the generation configuration cannot be read."""
    try:
        return [token.to_dict() for token in stop_tokens.of_folder(folder)]
    except SourceError as error:
        logger.warning("%s", error)
        return None


def report(result: ModelResult, *, as_json: bool = False) -> None:
    """Print what `export` or `compress` made: the manifest as JSON, or a few lines for people."""
    contents = result.manifest
    if as_json:
        print(json.dumps({"path": str(result.path), "notes": result.notes, **contents.to_dict()}))
        return
    for note in result.notes:
        console.note(f"note: {note}")
    for line in card.check_lines(contents.checks):
        console.note(f"  {line}")
    if result.log:
        console.note(f"  library messages: {result.log}")
    size = console.human_bytes(sum(file["bytes"] for file in contents.files.values()))
    layers = ", ".join(f"{count} {name}" for name, count in contents.recipe.get("layers", {}).items())
    print(f"{result.path}  {contents.recipe['name']}  {size}  {layers}".rstrip())


def _text(fields: dict[str, Any]) -> str:
    try:
        return "\n".join(_lines(fields))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise SourceError(
            f"{Path(fields['path']) / FILE_NAME} is damaged ({reason}); export the model again", code="manifest-damaged"
        ) from error


def _lines(fields: dict[str, Any]) -> list[str]:
    shape = fields["geometry"]
    model = (
        f"{shape['architecture']}, {shape['layers']} layers, hidden {shape['hidden']}, "
        f"{shape['heads']}/{shape['kv_heads']} heads, MLP {shape['intermediate']} ({shape['activation']}), "
        f"vocabulary {shape['vocab']}, context {shape['max_positions']}"
    )
    size = console.human_bytes(fields["total_bytes"])
    rows = [
        ("directory", f"{fields['path']}, {size}"),
        ("model", model),
        *_purpose(fields),
    ]
    if not fields["manifest"]:
        return _table([*rows, ("manifest", "none: made by another program; source and recipe are unknown")])
    source, recipe = fields["source"], fields["recipe"]
    revision = f" at {source['revision']}" if source.get("revision") else ""
    origin = f"{source['kind']} {source['id']}{revision}, license {source.get('license') or 'unknown'}"
    synthetic = ", SYNTHETIC: random weights" if source.get("synthetic") else ""
    rows += [
        ("source", origin + synthetic),
        ("recipe", recipe["name"]),
        ("weights", ", ".join(f"{count} {name}" for name, count in recipe.get("layers", {}).items()) or recipe["name"]),
    ]
    if recipe.get("calibration"):
        data = recipe["calibration"]
        rows.append(("calibration", f"{data['name']}, {data['samples']} samples, {data['tokens']} tokens"))
    rows += [("note", text) for text in (*recipe.get("notes", []), *fields["generation"].get("notes", []))]
    if added := fields["generation"].get("added"):
        rows.append(("added", f"to generation_config.json: {json.dumps(added)[1:-1]}"))
    rows += [("edited", f"{name}, since the export; what it says now is used") for name in fields["edited"]]
    rows += [("check", line) for line in card.check_lines(fields["checks"])]
    if "profile" in fields["sparsity"]:
        rows.append(("sparsity", f"{fields['sparsity']['profile']['mean']:.1%} exact zeros at down_proj's input"))
    if "kernels" in fields["sparsity"]:
        packed = fields["sparsity"]["kernels"]
        state = "were packed, but are gone from" if fields["lost_packed"] else "packed in"
        rows.append(("kernels", f"{len(packed['replaced'])} MLPs {state} {packed['folder']}/"))
    if fields["kernels_here"]:
        rows.append(("", f"on this machine: {fields['kernels_here']['text']}"))
    made_with = ", ".join(f"{name} {version}" for name, version in fields["versions"].items() if version)
    return _table([*rows, ("made with", made_with)])


def _purpose(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Where answers end, or what a model does that writes none."""
    if "text_encoder" not in fields:
        return [("ends at", _ends_text(fields["stop_tokens"]))]
    facts = fields["text_encoder"]
    rows = [("task", facts["task"]), ("reads", f"texts of up to {facts['max_tokens']} tokens")]
    if not facts["pooling"]:
        return rows
    length = "of length 1" if facts["normalize"] else "of any length"
    rows.append(("embedding", f"{facts['dimensions']} numbers, {length}, {facts['pooling']} pooling"))
    default = f"; {facts['default_prompt']} by default" if facts["default_prompt"] else ""
    return [*rows, *([("prompts", ", ".join(facts["prompts"]) + default)] if facts["prompts"] else [])]


def _ends_text(stops: list[dict[str, Any]] | None) -> str:
    if stops is None:
        return "unknown"
    ends = [f"{stop_tokens.shown(each['text'])} ({each['id']}, of {' and '.join(each['named_by'])})" for each in stops]
    return ", ".join(ends) or "no token: answers run to their limit"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<12} {value}" for name, value in rows]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm info`."""
    parser = command_parser("info", "Show recipe, sizes, checks and provenance of a model directory.")
    parser.add_argument("model_dir", help="model directory")
    parser.add_argument(
        "--verify", action="store_true", help="compare files, tokenizer, template and stop tokens with the manifest"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest with sizes as JSON")
    args = parser.parse_args(argv)
    fields = describe(args.model_dir, verify=args.verify)
    print(json.dumps(fields) if args.json else _text(fields))
    if args.verify and not args.json:
        recorded = f"all as recorded (sha256){', without relu2/, which is gone' if fields['lost_packed'] else ''}"
        for name, result in fields["proved"].items():
            print(f"{name.replace('_', ' '):<12} {result}")
        print("files       ", recorded if fields["manifest"] else "no digests to compare")
    return 0
