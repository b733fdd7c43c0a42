"""The end of an export for the CPU: the model is packed for the ReLU² kernels too, where that pays.

It happens without a request, so an export never fails because of it: a note says why a model was not packed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import ExtensionError, OVAFMError, last_line
from ..kernels import extension
from ..model_dir import manifest
from ..model_dir.manifest import PACKED_FOLDER
from ..runtime import kernel_choice
from ..system import console, resources
from ..system.child_process import ChildProcess, run_in_child

__all__ = ["compare", "pack", "pack_if_it_pays"]

TEXT = Path(__file__).resolve().parent.parent / "quantization" / "data" / "evaluation.txt"
# Enough for the share of zeros: each token has all neurons of all layers.
TOKENS = 64
# Memory and disk space needed, as a multiple of the weights: both copies at once, and a margin.
ROOM = 2.2


def pack(folder: Path, progress: console.Progress) -> manifest.Manifest:
    """Pack the model of a whole model directory, and measure here whether that is faster; returns its new manifest.

    Raises:
        ExtensionError: There is no native library, or the model has no MLP for it.
    """
    packed = _pack(folder, progress)
    compare(folder, progress)
    return packed


def compare(folder: Path, progress: console.Progress) -> str:
    """What the packed model is worth on this machine, for people; the device cache keeps it."""
    try:
        with progress.step("comparing with the plain model"):
            return run_in_child(kernel_choice.compare, folder)
    except (OVAFMError, RuntimeError) as error:
        return f"not compared with the plain model ({last_line(error)}); the first load does that"


def _pack(folder: Path, progress: console.Progress) -> manifest.Manifest:
    from ..kernels.pack import transform

    with progress.step("packing MLPs for the kernels") as advance:
        transform(folder, on_layer=advance)
    packed = manifest.read(folder)
    assert packed is not None
    return packed


def pack_if_it_pays(
    folder: Path, contents: manifest.Manifest, device: str | None, progress: console.Progress, log: Path
) -> tuple[manifest.Manifest, str | None]:
    """Pack a ReLU² model for the CPU if its zeros are worth it; returns the manifest, and a note for people."""
    recipe = str(contents.recipe.get("name", ""))
    for_cpu = (device or "CPU").upper() == "CPU" and not recipe.startswith("int4-npu")
    quantized = str(contents.recipe.get("weight_format", "")).startswith("int")
    relu2 = contents.geometry is not None and contents.geometry.activation == "relu2"
    if not (for_cpu and quantized and relu2):
        return contents, None
    try:
        extension.load()
    except ExtensionError as error:
        return contents, f"without the ReLU² kernels, which make the CPU faster: {error}"
    needed = ROOM * (folder / manifest.MODEL_BIN).stat().st_size
    for kind, free in (("memory", resources.free_memory()), ("disk space", shutil.disk_usage(folder).free)):
        if free < needed:
            figures = f"{console.human_bytes(needed)} of {kind} needed, {console.human_bytes(free)} free"
            return contents, f"not packed for the ReLU² kernels: {figures}; later: ov-afm kernels MODEL_DIR"
    from ..kernels.profile import profile

    try:
        with progress.step("counting zeros"):
            measured = ChildProcess(log=log).run(profile, folder, TEXT, max_tokens=TOKENS)
        if not measured.pays:
            return contents, f"not packed for the ReLU² kernels: with {measured.mean:.0%} zeros they would gain little"
        packed = _pack(folder, progress)
    except OVAFMError as error:
        return contents, f"not packed for the ReLU² kernels: {error}"
    note = f"packed for the ReLU² kernels too, in {PACKED_FOLDER}/ (--kernels none leaves that out)"
    return packed, f"{note}; on this machine {compare(folder, progress)}"
