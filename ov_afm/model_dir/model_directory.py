"""A model directory as one object: made once from a path, checked, and passed on to everything that works with it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SourceError
from ..presets import EMBEDDED_MODEL, Recipe
from ..system import console
from ..system.atomic import write_text
from ..system.json_text import parse
from . import card
from .geometry import Geometry
from .manifest import (
    CARD_FILE,
    FILE_NAME,
    MODEL_BIN,
    MODEL_XML,
    PACKED_FOLDER,
    Manifest,
    edited,
    files_of,
    scan,
    verify,
    write,
)
from .text_encoder import TextEncoder

__all__ = ["PACKED_FOLDER", "ModelDirectory", "ModelResult", "finish", "read_config"]

logger = logging.getLogger(__name__)
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
        SourceError: There is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        fields = parse(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise  # The file may be right; `system.os_errors` has the advice.
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be read: {error}; export the model again", code="config-unreadable"
        ) from error
    if not isinstance(fields, dict):
        raise SourceError(f"{path} holds no JSON object; export the model again", code="config-unreadable")
    return fields


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """A model directory that was found whole.

    Attributes:
        path: The folder.
        manifest: Contents of its `ov_afm.json`; None for a directory that another program made.
        config: Contents of its `config.json`.
        geometry: The model's shape.
    """

    path: Path
    manifest: Manifest | None
    config: Mapping[str, Any]
    geometry: Geometry

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        hashes: bool = False,
        packed: bool = True,
        any_task: bool = False,
        on_bytes: Callable[[int], None] | None = None,
    ) -> ModelDirectory:
        """Check that a model directory is whole and that this runtime can read it.

        Args:
            path: The folder.
            hashes: Compare sha256 too; sizes are always compared.
            packed: Check `relu2/` too, where it is. The plain model works without it.
            any_task: Take a model for embeddings or reranking too.
            on_bytes: Gets the size of each block hashed.

        Raises:
            SourceError: A file is missing, truncated or altered (named), or this is no model directory; for a source
                that must be exported first, the message has the command.
            ConfigError: It writes no text, and that is needed.
            OVAFMError: The directory was made by a newer OpenVINO than the one installed.
        """
        folder = Path(path)
        source = str(path) == EMBEDDED_MODEL or re.fullmatch(HUB_ID, str(path))
        if (source and not folder.exists()) or (folder.is_file() and folder.suffix.lower() == ".gguf"):
            raise SourceError(
                f"{path} is not an OpenVINO model directory; run: ov-afm export {path} --output DIR",
                code="model-not-exported",
            )
        contents = verify(folder, hashes=hashes, packed=packed, on_bytes=on_bytes)
        if contents is None:
            logger.info("%s has no %s: its files were not checked", folder, FILE_NAME)
        if contents and contents.text_encoder and not any_task:
            raise contents.text_encoder.refused(folder.resolve().name)
        for name in edited(folder, contents) if contents else ():
            logger.warning("%s was edited since the export; what it says now is used", folder / name)
        config = read_config(folder)
        return cls(folder, contents, config, Geometry.from_config(config))

    @property
    def edited(self) -> list[str]:
        """Files that people may edit and that are not as they were exported."""
        return edited(self.path, self.manifest) if self.manifest else []

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def xml(self) -> Path:
        """The IR's graph."""
        return self.path / MODEL_XML

    @property
    def bin(self) -> Path:
        """The IR's weights."""
        return self.path / MODEL_BIN

    @property
    def packed(self) -> Path:
        """The folder of the model that is packed for the native kernels, whether it exists or not."""
        return self.path / PACKED_FOLDER

    @property
    def lost_packed(self) -> bool:
        """Whether the manifest lists a model for the native kernels that is not there any more."""
        listed = self.manifest.files if self.manifest else {}
        return not (self.packed / MODEL_XML).exists() and any(name.startswith(f"{PACKED_FOLDER}/") for name in listed)

    @property
    def weights_bytes(self) -> int:
        """Size of the IR's weights."""
        return self.bin.stat().st_size

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together; those of one text where no text is written."""
        if self.text_encoder:
            return self.text_encoder.max_tokens
        return self.geometry.max_positions

    @property
    def text_encoder(self) -> TextEncoder | None:
        """What a model for embeddings or reranking does; None for one that writes text."""
        return self.manifest.text_encoder if self.manifest else None

    @property
    def parameters(self) -> int:
        """Weights of the model, norms left out."""
        if self.text_encoder:
            return self.text_encoder.parameters
        return self.geometry.parameters(tied=bool(self.config.get("tie_word_embeddings", False)))

    @property
    def recipe(self) -> Recipe | None:
        """The recipe; None where none is recorded, or it is none of ours (a prebuilt model may be mixed)."""
        if self.manifest is None or not self.manifest.recipe:
            return None
        try:
            return Recipe.from_dict(self.manifest.recipe)
        except (ConfigError, TypeError) as error:
            logger.info("the recipe of %s is not one of ours: %s", self.manifest.source.get("id"), error)
            return None

    @property
    def recipe_name(self) -> str:
        """The recorded name of the recipe; `unknown` where nobody recorded it."""
        return str((self.manifest.recipe.get("name") if self.manifest else None) or "unknown")

    @property
    def checks(self) -> Mapping[str, Any]:
        """What export measured of the model; empty where nothing is recorded."""
        return self.manifest.checks if self.manifest else {}

    @property
    def key(self) -> str:
        """Short digest of the model: of its hashes where it has them, else of what changes when its files do."""
        recorded = self.manifest.files if self.manifest else {}
        parts: list[Any] = [recorded[path.name]["sha256"] for path in (self.xml, self.bin) if path.name in recorded]
        if len(parts) < 2:
            stats = (self.xml.stat(), self.bin.stat())
            parts = [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for stat in stats]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ModelResult:
    """A model directory that `export` or `compress` made, or found finished.

    Attributes:
        path: The directory.
        manifest: Contents of its `ov_afm.json`.
        log: What the libraries printed while it was made; None if it existed already.
        notes: What the user should know: fallbacks, algorithms without effect, checks left out.
    """

    path: Path
    manifest: Manifest
    log: Path | None = None
    notes: list[str] = field(default_factory=list)


def finish(folder: Path, contents: Manifest, progress: console.Progress) -> None:
    """Complete a model directory: write its card and, last, its manifest with the digests of all files."""
    size = sum(path.stat().st_size for path in files_of(folder))
    with progress.step("hashing", total=size, unit="B") as advance:
        contents.files = scan(folder, advance)
    write_text(folder / CARD_FILE, card.render(contents))
    write(folder, contents)
