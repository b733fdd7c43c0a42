"""A finished model directory: closing it (digests, card, manifest last) and telling the user about it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..system import console
from . import card, manifest

__all__ = ["Bundle", "finish", "geometry", "report"]


@dataclass(frozen=True)
class Bundle:
    """A model directory that was made, or found finished.

    Attributes:
        path: The directory.
        manifest: Contents of its `ov_afm.json`.
        log: What the libraries printed while it was made; None if it was there already.
        notes: What the user should know: fallbacks, algorithms without effect, checks left out.
    """

    path: Path
    manifest: manifest.Manifest
    log: Path | None = None
    notes: list[str] = field(default_factory=list)


def geometry(folder: Path) -> dict[str, Any]:
    """The manifest's geometry from the `config.json` of a folder.

    Raises:
        SourceError: There is none, or it is not JSON.
    """
    try:
        return manifest.geometry_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: {error}") from error


def finish(folder: Path, contents: manifest.Manifest, progress: console.Progress) -> None:
    """Write card, digests and, last, the manifest of a model directory."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with progress.step("hashing", total=size, unit="B") as advance:
        contents.files = manifest.scan(folder, advance)
    (folder / "README.md").write_text(card.render(contents), encoding="utf-8")
    manifest.write(folder, contents)


def report(bundle: Bundle, *, as_json: bool = False) -> None:
    """Print what was made: the manifest as JSON, or a few lines for people."""
    if as_json:
        print(json.dumps({"path": str(bundle.path), "notes": bundle.notes, **dataclasses.asdict(bundle.manifest)}))
        return
    size = sum(file["bytes"] for file in bundle.manifest.files.values())
    for note in bundle.notes:
        console.note(f"note: {note}")
    for line in card.check_lines(bundle.manifest.checks):
        console.note(f"  {line}")
    if bundle.log:
        console.note(f"  library messages: {bundle.log}")
    layers = ", ".join(f"{count} {name}" for name, count in bundle.manifest.recipe.get("layers", {}).items())
    print(f"{bundle.path}  {bundle.manifest.recipe['name']}  {console.human_bytes(size)}  {layers}".rstrip())
