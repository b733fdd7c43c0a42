"""Align the constants of an OpenVINO IR in its `.bin`.

OpenVINO writes constants one after the other, at any byte. The kernels use them where the file is mapped, without a
copy, so pages are shared between processes, dropped when memory is short, and never read for neurons that are never
active. Aligned, a row of weights is whole cache lines, and no vector load spans two.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import BinaryIO

__all__ = ["align_constants", "missing_bytes"]

PAGE = 4096
CACHE_LINE = 64
LARGE = 64 * 1024
BLOCK = 1 << 24
# The `data` element of every constant, nested bodies included.
CONSTANTS = ".//layer[@type='Const']/data[@offset]"


def align_constants(xml: Path, weights: Path) -> None:
    """Rewrite both files in place: large constants start on a page, small ones on a cache line.

    Args:
        xml: The IR's `.xml`.
        weights: Its `.bin`; a second copy exists while it is rewritten.
    """
    tree = ET.parse(xml)
    moved: dict[tuple[int, int], int] = {}
    aligned = weights.with_suffix(".aligned")
    with weights.open("rb") as source, aligned.open("wb") as target:
        for data in tree.findall(CONSTANTS):
            at, size = int(data.attrib["offset"]), int(data.attrib["size"])
            if (at, size) not in moved:
                moved[at, size] = _append(source, at, size, target)
            data.set("offset", str(moved[at, size]))
    tree.write(xml, encoding="utf-8", xml_declaration=True)
    aligned.replace(weights)


def _append(source: BinaryIO, at: int, size: int, target: BinaryIO) -> int:
    step = PAGE if size >= LARGE else CACHE_LINE
    target.write(bytes(-target.tell() % step))
    start = target.tell()
    source.seek(at)
    for begin in range(0, size, BLOCK):
        target.write(source.read(min(BLOCK, size - begin)))
    return start


def missing_bytes(xml: Path, weights: Path) -> int:
    """How many bytes of constants lie past the end of the `.bin`: 0 for a whole one."""
    ends = (int(data.attrib["offset"]) + int(data.attrib["size"]) for data in ET.parse(xml).findall(CONSTANTS))
    size = weights.stat().st_size if weights.exists() else 0
    return max(0, max(ends, default=0) - size)
