"""What a model directory is: `ov-afm info`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model_dir import card, manifest
from ..model_dir.bundle import geometry
from ..system import console
from .command import command
from .command import parser as command_parser

__all__ = ["describe"]


def describe(model_dir: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """The manifest of a model directory, with its sizes.

    Args:
        model_dir: The directory.
        verify: Compare the sha256 of every file too.

    Raises:
        SourceError: It is no whole model directory.
    """
    folder = Path(model_dir)
    if verify:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        with console.Progress() as progress, progress.step("hashing", total=size, unit="B") as advance:
            found = manifest.verify(folder, hashes=True, on_bytes=advance)
    else:
        found = manifest.verify(folder)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if found is None:
        return {"path": str(folder), "total_bytes": total, "geometry": geometry(folder), "manifest": False}
    return {"path": str(folder), "total_bytes": total, "manifest": True, **dataclasses.asdict(found)}


def _lines(fields: dict[str, Any]) -> list[str]:
    shape = fields["geometry"]
    rows = [
        ("directory", f"{fields['path']}, {console.human_bytes(fields['total_bytes'])}"),
        (
            "model",
            f"{shape['architecture']}, {shape['layers']} layers, hidden {shape['hidden']}, "
            f"{shape['heads']}/{shape['kv_heads']} heads, MLP {shape['intermediate']} ({shape['activation']}), "
            f"vocabulary {shape['vocab']}, context {shape['max_positions']}",
        ),
    ]
    if not fields["manifest"]:
        return _table([*rows, ("manifest", "none: made by another program; nothing is known of source and recipe")])
    source, recipe = fields["source"], fields["recipe"]
    revision = f" at {source['revision']}" if source.get("revision") else ""
    synthetic = ", SYNTHETIC: random weights" if source.get("synthetic") else ""
    rows += [
        (
            "source",
            f"{source['kind']} {source['id']}{revision}, license {source.get('license') or 'unknown'}{synthetic}",
        ),
        ("recipe", recipe["name"]),
        ("weights", ", ".join(f"{count} {name}" for name, count in recipe.get("layers", {}).items()) or recipe["name"]),
    ]
    if recipe.get("calibration"):
        data = recipe["calibration"]
        rows.append(("calibration", f"{data['name']}, {data['samples']} samples, {data['tokens']} tokens"))
    rows += [("note", text) for text in recipe.get("notes", [])]
    rows += [("check", line) for line in card.check_lines(fields["checks"])]
    if "profile" in fields["sparsity"]:
        rows.append(("sparsity", f"{fields['sparsity']['profile']['mean']:.1%} exact zeros at down_proj's input"))
    if "kernels" in fields["sparsity"]:
        packed = fields["sparsity"]["kernels"]
        rows.append(("kernels", f"{len(packed['replaced'])} MLPs packed in {packed['folder']}/"))
    made_with = ", ".join(f"{name} {version}" for name, version in fields["versions"].items() if version)
    return _table([*rows, ("made with", made_with)])


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<12} {value}" for name, value in rows]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm info`."""
    parser = command_parser("info", "Show recipe, sizes, checks and provenance of a model directory.")
    parser.add_argument("model_dir", help="model directory")
    parser.add_argument("--verify", action="store_true", help="compare the sha256 of every file with the manifest")
    parser.add_argument("--json", action="store_true", help="print the manifest with sizes as JSON")
    args = parser.parse_args(argv)
    fields = describe(args.model_dir, verify=args.verify)
    print(json.dumps(fields) if args.json else "\n".join(_lines(fields)))
    if args.verify and not args.json:
        print("files        all as recorded (sha256)" if fields["manifest"] else "files        no digests to compare")
    return 0


if __name__ == "__main__":
    from .info import main as run

    sys.exit(run())
