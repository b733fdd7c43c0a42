"""The native library: where it is, whether it fits this OpenVINO, and how to build it.

OpenVINO's C++ interface belongs to one release, so the library carries the release in its name and is
loaded by no other. Without a library everything works, only slower.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from ..errors import ExtensionError
from ..system import paths
from ..system.atomic import replacing

__all__ = ["best_isa", "build", "has_isa", "library", "load", "runtime_version"]

STEM = "ov_afm_kernels-"
INTERFACE = 2  # version of operations and layout; the same number is in csrc/op.cpp
SUFFIX = ".dll" if os.name == "nt" else ".so"
HERE = Path(__file__).resolve().parent
BUILD = "ov-afm kernels --build"


def runtime_version() -> str:
    """Release of the installed OpenVINO, as `2026.4.1`."""
    return ".".join(metadata.version("openvino").split(".")[:3])


def _candidates() -> list[Path]:
    # An editable installation keeps what it built among the installed packages, not in the source tree.
    installed = Path(sysconfig.get_path("platlib")) / "ov_afm" / "kernels"
    folders = dict.fromkeys((HERE, installed, paths.cache_dir() / "kernels"))
    return [path for folder in folders for path in sorted(folder.glob(f"{STEM}*{SUFFIX}"))]


def library() -> Path:
    """The library that fits the installed OpenVINO.

    Raises:
        ExtensionError: There is none, or only one of another OpenVINO release (named).
    """
    running = runtime_version()
    candidates = _candidates()
    for path in candidates:
        if path.name == f"{STEM}{running}{SUFFIX}":
            return path
    if candidates:
        versions = ", ".join(sorted({path.name[len(STEM) : -len(SUFFIX)] for path in candidates}))
        raise ExtensionError(
            f"the ReLU² kernels are built for OpenVINO {versions}, this is {running}; build them again with: {BUILD}",
            code="kernels-version",
        )
    raise ExtensionError(
        f"the ReLU² kernels are not built; build them (C++ compiler and CMake needed) with: {BUILD}",
        code="kernels-missing",
    )


def load() -> Path:
    """The library that fits, loaded into the process for good.

    OpenVINO unloads a library with the last core that knew it, and a node that lives longer then crashes the process.

    Raises:
        ExtensionError: There is no library that fits, or it cannot be loaded.
    """
    path = library()
    _load(path)
    return path


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    import openvino  # noqa: F401  the library finds OpenVINO and TBB in the process

    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise ExtensionError(
            f"the ReLU² kernels {path} cannot be loaded ({error}); build them again with: {BUILD}",
            code="kernels-damaged",
        ) from error
    if getattr(loaded, "ov_afm_interface", int)() != INTERFACE:
        raise ExtensionError(
            f"the ReLU² kernels {path} were built for another version of ov-afm; build them again with: {BUILD}",
            code="kernels-interface",
        )
    loaded.ov_afm_best_isa.restype = ctypes.c_char_p
    loaded.ov_afm_has_isa.argtypes = [ctypes.c_char_p]
    return loaded


def best_isa() -> str:
    """Name of the instruction set whose kernels run here: `amx`, `avx512vnni`, `avx2vnni`, `avx2` or `portable`.

    Raises:
        ExtensionError: There is no library that fits, or it cannot be loaded.
    """
    return str(_load(library()).ov_afm_best_isa(), "ascii")


def has_isa(name: str) -> bool:
    """Whether this CPU and the library have the kernels of an instruction set.

    Raises:
        ExtensionError: There is no library that fits, or it cannot be loaded.
    """
    return bool(_load(library()).ov_afm_has_isa(name.encode()))


def _sources() -> Path:
    for folder in (HERE / "csrc", HERE.parent.parent / "csrc"):
        if (folder / "CMakeLists.txt").exists():
            return folder
    raise ExtensionError("the sources of the ReLU² kernels are not installed; install ov-afm from its source archive")


def build(target: Path | None = None) -> Path:
    """Build the library for the installed OpenVINO with CMake and the system's compiler (about a minute).

    Args:
        target: Folder to put it in; the package's own folder if that can be written, else the user's cache.

    Returns:
        Path of the library.

    Raises:
        ExtensionError: CMake or the compiler is missing, or the build failed (with the compiler's last lines).
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise ExtensionError("CMake is needed to build the ReLU² kernels; install it with: pip install cmake")
    if target is None:
        target = HERE if os.access(HERE, os.W_OK) else paths.cache_dir() / "kernels"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DOV_AFM_REQUIRE_KERNELS=ON", "-DCMAKE_BUILD_TYPE=Release"]
        _run([cmake, "-S", str(_sources()), "-B", work, *options])
        _run([cmake, "--build", work, "--config", "Release", "--parallel", "2"])
        built = next(iter(sorted(Path(work).rglob(f"{STEM}*{SUFFIX}"))))
        # A process that has the old library mapped keeps it.
        with replacing(target / built.name) as temporary:
            shutil.copyfile(built, temporary)
        return target / built.name


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        # CMake gives the reason on the line after the place; compilers on the same line.
        match = re.search(r"^CMake Error.*\n+\s*(.+)$|^(.*error.*)$", done.stderr + done.stdout, re.M | re.I)
        reason = "no message" if match is None else (match[1] or match[2]).strip()
        raise ExtensionError(f"building the ReLU² kernels failed: {reason}")
