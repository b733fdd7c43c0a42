"""The end of an export for the CPU: the model is packed for the ReLU² kernels too, where that pays.

That nobody asked for it means that it may not cost anything but time and disk space: an export that is whole without
never fails because of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import ExtensionError, OVAFMError
from ..model_dir import manifest
from ..system import child_process, console, resources

__all__ = ["pack", "pack_if_it_pays"]

TEXT = Path(__file__).resolve().parent.parent / "quantization" / "data" / "evaluation.txt"
# Of the text, for the share of zeros: all neurons of all layers vote on each.
TOKENS = 64
# Of the weights: both copies at once, and a margin.
MEMORY = DISK = 2.2
LATER = "ov-afm kernels MODEL_DIR"


def pack(folder: Path, progress: console.Progress) -> manifest.Manifest:
    """Pack the model of a whole model directory; returns its new manifest.

    Raises:
        ExtensionError: There is no native library, or the model has no MLP for it.
    """
    from ..kernels.pack import transform

    with progress.step("packing MLPs for the kernels") as advance:
        transform(folder, on_layer=advance)
    packed = manifest.read(folder)
    assert packed is not None
    return packed


def pack_if_it_pays(
    folder: Path, result: manifest.Manifest, device: str | None, progress: console.Progress, log: Path
) -> tuple[manifest.Manifest, str | None]:
    """Pack a ReLU² model for the CPU if its zeros are worth it; returns the manifest, and a note for people."""
    recipe = str(result.recipe.get("name", ""))
    for_cpu = (device or "CPU").upper() == "CPU" and not recipe.startswith("int4-npu")
    quantized = str(result.recipe.get("weight_format", "")).startswith("int")
    if not (for_cpu and quantized and result.geometry.get("activation") == "relu2"):
        return result, None
    from ..kernels import extension

    try:
        extension.load()
    except ExtensionError as error:
        return result, f"without the ReLU² kernels, which make the CPU faster: {error}"
    size = sum(path.stat().st_size for path in folder.glob("openvino_model.bin"))
    for kind, free, needed in (
        ("memory", resources.free_memory(), MEMORY * size),
        ("disk space", shutil.disk_usage(folder).free, DISK * size),
    ):
        if free < needed:
            wanted = f"{console.human_bytes(needed)} of {kind} wanted, {console.human_bytes(free)} found"
            return result, f"not packed for the ReLU² kernels: {wanted}; later: {LATER}"
    try:
        with progress.step("counting zeros"):
            found = child_process.run("ov_afm.conversion.pack_kernels:_profile", {"model_dir": str(folder)}, log=log)
        if not found["pays"]:
            return result, f"not packed for the ReLU² kernels: with {found['mean']:.0%} zeros they would gain little"
        return pack(folder, progress), "packed for the ReLU² kernels too, in relu2/ (--kernels none leaves that out)"
    except OVAFMError as error:
        return result, f"not packed for the ReLU² kernels: {error}"


def _profile(model_dir: str) -> dict[str, Any]:
    from ..kernels.profile import profile

    found = profile(Path(model_dir), TEXT, max_tokens=TOKENS)
    return {"pays": found.pays, "mean": found.mean}
