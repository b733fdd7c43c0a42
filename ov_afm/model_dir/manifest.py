"""The manifest `ov_afm.json`: what a model directory is, where it came from and what was proved of it.

It is written last, so a directory that has one is whole; and it is checked before anything is
loaded, because OpenVINO reads a truncated `.bin` or an IR from the future without complaint and
dies later.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import OVAFMError, SourceError
from ..system.atomic import write_json
from ..system.json_text import parse
from . import manifest_fields
from .geometry import Geometry
from .text_encoder import TextEncoder

__all__ = [
    "CARD_FILE",
    "FILE_NAME",
    "MODEL_BIN",
    "MODEL_XML",
    "PACKED_FOLDER",
    "Manifest",
    "edited",
    "files_of",
    "installed_versions",
    "read",
    "scan",
    "sha256",
    "verify",
    "write",
]

FILE_NAME = "ov_afm.json"
CARD_FILE = "README.md"
SCHEMA = 1
MODEL_XML = "openvino_model.xml"
MODEL_BIN = "openvino_model.bin"
IR_FILES = [f"openvino_{part}.{suffix}" for part in ("model", "tokenizer", "detokenizer") for suffix in ("xml", "bin")]
REQUIRED = (*IR_FILES, "config.json")
# People set their own sampling values and stop tokens in it.
EDITABLE = ("generation_config.json",)
# Subfolder with the model whose weights are packed for the native kernels.
PACKED_FOLDER = "relu2"
OPENVINO_PACKAGES = ("openvino", "openvino_genai", "openvino_tokenizers")
PACKAGES = ("ov_afm", *OPENVINO_PACKAGES, "nncf", "optimum_intel", "transformers", "torch")


@dataclass
class Manifest:
    """Contents of `ov_afm.json`.

    Attributes:
        source: kind, id, revision, sha256 of each weight file, license; `synthetic` where it is.
        geometry: The model's shape; None where it is not recorded.
        recipe: Every compression parameter as used (see `presets.Recipe`), calibration data by name and sha256.
        versions: Versions of the packages that made the directory; None where not installed.
        files: File name to `{"bytes": int, "sha256": str}`.
        checks: What verification measured, or why it was skipped.
        sparsity: Per-layer zero fraction and kernel layout, once profiled.
        generation: What was added to the source's generation configuration, and the tokens that end an answer.
        text_encoder: What a model for embeddings or reranking does with its vectors; None for a model that writes text.
        schema: Version of this layout.
    """

    source: dict[str, Any]
    geometry: Geometry | None
    recipe: dict[str, Any]
    versions: dict[str, str | None] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    sparsity: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    text_encoder: TextEncoder | None = None
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """As `ov_afm.json` holds it."""
        fields = {**asdict(self), "geometry": self.geometry.to_dict() if self.geometry else {}}
        del fields["text_encoder"]
        return {**fields, "text_encoder": self.text_encoder.to_dict()} if self.text_encoder else fields


def installed_versions() -> dict[str, str | None]:
    """Version of each package that shapes a model directory; None where it is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name.replace("_", "-"))
    return versions


def sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file's content; `on_bytes` gets the size of each block read."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            if on_bytes:
                on_bytes(len(block))
    return digest.hexdigest()


def files_of(folder: Path) -> list[Path]:
    """All files of a model directory or a checkpoint, without those in hidden folders of it.

    Such are the `.cache` of a download and the `.git` of a clone. Where the folder itself lies does not matter.
    """
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parent.parts)
    ]


def scan(model_dir: Path, on_bytes: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
    """Size and digest of every file of a model directory but the manifest and the model card.

    The card is left out because people edit it.
    """
    return {
        path.relative_to(model_dir).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path, on_bytes)}
        for path in files_of(model_dir)
        if path.name not in (FILE_NAME, CARD_FILE)
    }


def write(model_dir: Path, manifest: Manifest) -> None:
    """Write the manifest, replacing an older one in a single step."""
    write_json(model_dir / FILE_NAME, manifest.to_dict())


def read(model_dir: Path) -> Manifest | None:
    """The manifest of a model directory, or None if it has none (made by optimum-cli, say).

    Raises:
        SourceError: The manifest is there but is not one, or is of a newer layout.
    """
    path = model_dir / FILE_NAME
    if not path.exists():
        return None
    try:
        fields = parse(path.read_text(encoding="utf-8"))
        schema = fields["schema"]
        if isinstance(schema, int) and schema <= SCHEMA:
            return _checked(fields)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise SourceError(f"{path} is damaged ({reason}); export the model again", code="manifest-damaged") from error
    raise SourceError(
        f"{path} has layout {schema}, this ov_afm reads up to {SCHEMA}; upgrade with: pip install -U ov-afm",
        code="manifest-newer",
    )


def _checked(fields: Mapping[str, Any]) -> Manifest:
    """The manifest of these fields; raises TypeError or KeyError where one is not of its kind."""
    known = {key: value for key, value in fields.items() if key in Manifest.__dataclass_fields__}
    for name, value in known.items():
        if name != "schema" and not isinstance(value, dict):
            raise TypeError(f"{name} is no object")
    manifest_fields.check(known)
    for name in known.get("files", ()):
        if PurePosixPath(name).is_absolute() or not {"..", ""}.isdisjoint(name.split("/")) or "\\" in name:
            raise TypeError(f"{name!r} is no file in this directory")
    known["geometry"] = Geometry.from_dict(known["geometry"]) if known["geometry"] else None
    if "text_encoder" in known:
        known["text_encoder"] = TextEncoder.from_dict(known["text_encoder"])
    return Manifest(**known)


def verify(
    model_dir: Path, *, hashes: bool = False, packed: bool = True, on_bytes: Callable[[int], None] | None = None
) -> Manifest | None:
    """Check that a model directory is whole and that this runtime can read it.

    Args:
        model_dir: The directory.
        hashes: Compare sha256 too; sizes are always compared.
        packed: Check `relu2/` too, where it is. The plain model works without it.
        on_bytes: Gets the size of each block hashed.

    Returns:
        The manifest; None for a directory without one, of which only the presence of files was checked.

    Raises:
        SourceError: A file is missing, truncated or altered (named), or the directory is no model directory.
        OVAFMError: The directory was made by a newer OpenVINO than the one installed.
    """
    if not model_dir.exists():
        raise SourceError(f"no such model directory: {model_dir}", code="model-dir-missing")
    if not model_dir.is_dir():
        raise SourceError(f"{model_dir} is a file; a model directory is needed", code="model-dir-is-file")
    if not (model_dir / MODEL_XML).exists() and (model_dir / "config.json").exists():
        raise SourceError(
            f"{model_dir} is a checkpoint, not an OpenVINO model; run: ov-afm export {model_dir} --output DIR",
            code="model-not-exported",
        )
    missing = [name for name in REQUIRED if not (model_dir / name).exists()]
    if missing:
        raise SourceError(
            f"{model_dir} is not a whole model directory: {', '.join(missing)} missing; export the model again",
            code="model-dir-incomplete",
        )
    manifest = read(model_dir)
    if manifest is None:
        return None
    unlisted = [name for name in REQUIRED if name not in manifest.files]
    if unlisted:
        raise SourceError(
            f"{model_dir / FILE_NAME} does not list {unlisted[0]}, so nothing shows that it is whole; "
            "export the model again",
            code="manifest-incomplete",
        )
    _check_runtime(model_dir, manifest.versions)
    with_packed = packed and (model_dir / PACKED_FOLDER / MODEL_XML).exists()
    for name, expected in manifest.files.items():
        in_packed = name.startswith(f"{PACKED_FOLDER}/")
        if not in_packed or with_packed:
            advice = f"pack it again with: ov-afm kernels {model_dir}" if in_packed else "export the model again"
            _check_file(model_dir / name, expected, advice, hashes, on_bytes)
    return manifest


def _check_file(
    path: Path, expected: Mapping[str, Any], advice: str, hashes: bool, on_bytes: Callable[[int], None] | None
) -> None:
    if not path.exists():
        raise SourceError(f"{path} is missing; {advice}", code="model-dir-incomplete")
    if path.name in EDITABLE:
        return
    size, recorded = path.stat().st_size, expected["bytes"]
    if size != recorded or (hashes and sha256(path, on_bytes) != expected["sha256"]):
        by_digest = "its sha256 is not the one recorded"
        damage = by_digest if size == recorded else f"{size} bytes where {recorded} were written"
        raise SourceError(f"{path} is damaged: {damage}; {advice}", code="model-file-damaged")


def edited(model_dir: Path, manifest: Manifest) -> list[str]:
    """The files of a model directory that people may edit, and did."""
    return [
        name
        for name in EDITABLE
        if name in manifest.files and sha256(model_dir / name) != manifest.files[name]["sha256"]
    ]


def _check_runtime(model_dir: Path, versions: Mapping[str, str | None]) -> None:
    made_by, running = versions.get("openvino"), installed_versions()["openvino"]
    # An IR newer than the runtime can crash it without a message: openvinotoolkit/model_server#4461
    if made_by and running and _release(made_by) > _release(running):
        raise OVAFMError(
            f"{model_dir} was made by OpenVINO {made_by}, this is {running}; "
            f"upgrade with: pip install -U 'openvino-genai>={'.'.join(map(str, _release(made_by)))}'",
            code="openvino-older",
        )


def _release(version: str) -> tuple[int, ...]:
    """(year, minor) of an OpenVINO version; patches of one minor read each other's IR."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
