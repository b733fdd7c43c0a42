"""An OpenVINO model that somebody else made becomes a model directory as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import ExportError, OVAFMError
from ..model_dir import manifest
from ..system import child_process, console, resources
from .sources import Source

__all__ = ["adopt"]


def adopt(source: Source, partial: Path, progress: console.Progress, log: Path, verify: bool) -> manifest.Manifest:
    """Take an OpenVINO model as it is: copy it, check its tokenizer, describe it.

    Raises:
        OVAFMError: It is not whole, or its tokenizer cannot be used.
    """
    files = [path for path in sorted(source.path.rglob("*")) if path.is_file() and ".cache" not in path.parts]
    resources.check_disk(partial, {"the model": sum(path.stat().st_size for path in files)})
    with progress.step("copying", total=len(files)) as advance:
        for path in files:
            relative = path.relative_to(source.path)
            (partial / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / relative)
            advance(1)
    missing = [name for name in manifest.REQUIRED if not (partial / name).exists()]
    if missing:
        raise OVAFMError(
            f"{source.id} is not a whole OpenVINO model: {', '.join(missing)} missing; export its source instead"
        )
    checks: dict[str, Any] = {"skipped": "asked for with --no-verify"}
    if verify:
        arguments = {"checkpoint": str(partial), "bundle": str(partial), "reference": None, "trust_remote_code": False}
        with progress.step("verifying the result"):
            checks = child_process.run("ov_afm.conversion.verify:measure", arguments, log=log, died=ExportError)
        checks["export_parity"] = {"skipped": "made elsewhere; the checkpoint is not at hand"}
    return manifest.Manifest(
        source=source.describe(),
        geometry=manifest.geometry_of(source.config),
        recipe={"name": "prebuilt", **child_process.run("ov_afm.compress:describe_weights", {"folder": str(partial)})},
        versions=manifest.installed_versions(),
        checks=checks,
    )
