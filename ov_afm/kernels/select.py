"""Which files an engine loads: the model for the kernels where it can run, else the plain one."""

from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from ..errors import ExtensionError
from ..model_dir.manifest import MODEL_BIN, MODEL_XML, PACKED_FOLDER, read
from . import extension
from .ir_alignment import missing_bytes

__all__ = ["DISABLE", "NOTES", "engine_model", "is_forced", "is_packed", "plain_model"]

# 1: never the kernels; 0: always, also where they were measured to be slower.
DISABLE = "OV_AFM_NO_KERNELS"
# Where a packed IR notes what made it: `layout`, and `weights`, the sha256 of the plain model's.
NOTES = "ov_afm"

logger = logging.getLogger(__name__)


def is_packed(model_dir: Path) -> bool:
    """Whether a folder holds a model that needs the native kernels, and lies in the model directory it came from."""
    both = (model_dir, model_dir.parent)
    return model_dir.name == PACKED_FOLDER and all((folder / MODEL_XML).exists() for folder in both)


def is_forced() -> bool:
    """Whether the environment asks for the kernels, whatever was measured."""
    return os.environ.get(DISABLE) == "0"


def plain_model(model_dir: Path, device: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the extra properties for an engine that changes the graph, and so cannot use the packed model.

    Raises:
        ExtensionError: `model_dir` is a `relu2/` folder itself.
    """
    if is_packed(model_dir):
        raise ExtensionError(f"{model_dir} is packed for the kernels, which know no adapters; use {model_dir.parent}")
    if (model_dir / PACKED_FOLDER / MODEL_XML).exists() and device == "CPU":
        logger.warning("running without the ReLU² kernels: they know no adapters; merged, both work")
    return model_dir, {}


def _was_packed(model_dir: Path) -> bool:
    """Whether the manifest lists a packed model."""
    contents = read(model_dir)
    return contents is not None and any(name.startswith(f"{PACKED_FOLDER}/") for name in contents.files)


def _check(packed: Path) -> None:
    """Refuse a packed model that is not whole, or that is not what this version makes of the plain model beside it."""
    again = f"run: ov-afm kernels {packed.parent}"
    if lacking := missing_bytes(packed / MODEL_XML, packed / MODEL_BIN):
        raise ExtensionError(
            f"{packed} is damaged: {lacking} bytes of packed weights are missing; {again}", code="kernels-truncated"
        )
    notes = ET.parse(packed / MODEL_XML).find(f"./rt_info/{NOTES}")
    layout, weights = (_value(notes, name) for name in ("layout", "weights"))
    # Without a note it is 2, the last that noted nothing.
    if (layout or "2") != str(extension.INTERFACE):
        raise ExtensionError(
            f"{packed} has the layout of another version of ov-afm ({layout or 2}, this one has "
            f"{extension.INTERFACE}); {again}",
            code="kernels-layout",
        )
    contents = read(packed.parent)
    expected = contents.files.get(MODEL_BIN, {}).get("sha256") if contents else None
    if weights and expected and weights != expected:
        raise ExtensionError(f"{packed} was packed from another model; {again}", code="kernels-other-model")


def _value(notes: ET.Element | None, name: str) -> str | None:
    note = None if notes is None else notes.find(name)
    return None if note is None else note.get("value")


def engine_model(model_dir: Path, device: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the extra properties for `LLMPipeline`.

    A model directory without `relu2/`, a device other than CPU, and `OV_AFM_NO_KERNELS=1` mean the plain model. So does
    a native library that is missing or does not fit; that is logged as a warning, once a load.

    Args:
        model_dir: A model directory, or the `relu2/` folder of one.
        device: OpenVINO's name of the device.

    Raises:
        ExtensionError: `model_dir` is itself a `relu2/` folder that cannot run here, so there is no plain path to take.
    """
    packed = model_dir if is_packed(model_dir) else model_dir / PACKED_FOLDER
    required = packed == model_dir
    try:
        if os.environ.get(DISABLE, "0") not in ("", "0"):
            return model_dir, {}
        if not (packed / MODEL_XML).exists():
            if device.partition(".")[0].upper() == "CPU" and _was_packed(model_dir):
                raise ExtensionError(f"{packed} is gone; make it again with: ov-afm kernels {model_dir}")
            return model_dir, {}
        if device.partition(".")[0].upper() != "CPU":
            if not required:
                return model_dir, {}
            raise ExtensionError(f"{packed} is packed for the CPU, found device {device}; use {packed.parent}")
        library = extension.load()
        _check(packed)
        return packed, {"extensions": [str(library)]}
    except ExtensionError as error:
        if required:
            raise
        logger.warning("running without the ReLU² kernels: %s", error)
        return model_dir, {}
