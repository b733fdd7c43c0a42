"""Which files an engine loads: the model for the kernels where it can run, else the plain one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ..errors import ExtensionError
from ..model_dir.manifest import MODEL_BIN, MODEL_XML, PACKED_FOLDER, read
from . import extension
from .ir_alignment import missing_bytes

__all__ = ["DISABLE", "engine_model", "is_packed", "plain_model"]

DISABLE = "OV_AFM_NO_KERNELS"

logger = logging.getLogger(__name__)


def is_packed(model_dir: Path) -> bool:
    """Whether a folder holds a model that needs the native kernels, and lies in the model directory it came from."""
    both = (model_dir, model_dir.parent)
    return model_dir.name == PACKED_FOLDER and all((folder / MODEL_XML).exists() for folder in both)


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
        if lacking := missing_bytes(packed / MODEL_XML, packed / MODEL_BIN):
            raise ExtensionError(
                f"{packed} is damaged: {lacking} bytes of packed weights are missing; "
                f"run: ov-afm kernels {packed.parent}"
            )
        return packed, {"extensions": [str(extension.load())]}
    except ExtensionError as error:
        if required:
            raise
        logger.warning("running without the ReLU² kernels: %s", error)
        return model_dir, {}
