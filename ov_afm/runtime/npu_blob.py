"""The note beside a file with a compiled model (`Use.blob`): what it was compiled from and for.

NPUW reads any blob as if it were the right one, and one of another model kills the process (2026.4.1). A blob without
its note was not finished, or comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..model_dir import manifest
from ..model_dir.outputs import check_file
from ..system.atomic import write_json
from ..system.json_text import parse

__all__ = ["check", "origin", "seal"]

# These name files and do not change what is compiled.
_NOT_COMPILED = ("BLOB_PATH", "EXPORT_BLOB", "WEIGHTS_PATH")


def origin(model: str, device: str, driver: str | None, properties: Mapping[str, Any]) -> dict[str, Any]:
    """All that a blob depends on, as `check` compares it.

    Args:
        model: The model's key.
        device: The device's full name.
        driver: Its driver version.
        properties: What the model is loaded with.
    """
    used = {key: str(value) for key, value in sorted(properties.items()) if key not in _NOT_COMPILED}
    versions = manifest.installed_versions()
    return {"model": model, "device": device, "driver": driver, "openvino": versions["openvino"], "properties": used}


def check(blob: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a blob that is not of this model on this device.

    Args:
        blob: The file; if it does not exist, its folder must, to write it to.
        expected: From `origin`.

    Raises:
        ConfigError: Names what differs; or a file that is not ours lies where the note will be written.
    """
    if not blob.exists():
        if not blob.parent.is_dir():
            raise ConfigError(f"no folder {blob.parent} to write {blob.name} to")
        # It is written when the blob is.
        check_file(_note(blob), ours=_is_note, what="a note of ov_afm on a compiled model")
        return
    try:
        recorded = parse(_note(blob).read_text(encoding="utf-8"))
        different = [key for key in expected if recorded[key] != expected[key]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{blob} has no {_note(blob).name} beside it: it was not finished, or not written here; delete it"
        ) from None
    if different:
        raise ConfigError(
            f"{blob} was compiled for something else: another {', '.join(different)}; name another file or delete it"
        )


def _is_note(data: bytes) -> bool:
    try:
        recorded = parse(data)
    except ValueError:
        return False
    return isinstance(recorded, dict) and {"model", "device", "openvino"} <= set(recorded)


def seal(blob: Path, origin: Mapping[str, Any]) -> None:
    """Write the note of a blob that was just written."""
    write_json(_note(blob), origin, indent=1)


def _note(blob: Path) -> Path:
    return blob.with_suffix(".blob.json")
