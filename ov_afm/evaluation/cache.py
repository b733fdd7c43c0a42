"""Results of evaluations on disk: the reference's distributions, and each candidate's scores, block by block.

A reference is as slow as a candidate and computes the same for every recipe that is tried. Its log-probabilities are
stored as 16-bit integers, linear between 0 and each row's least value: at most 0.0006 nats from the exact value, 2
bytes a vocabulary entry. What has to be exact, the token ranked first and the likelihood of the token that follows, is
stored beside them at full precision. A block is a file that appears whole, so that an interrupted evaluation
continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OVAFMError
from ..model_dir import manifest
from ..system import console
from ..system.atomic import disk_full_as_error, replacing, write_text
from ..system.paths import cache_dir
from ..system.resources import check_disk
from .divergence import Scores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Expected", "Journal", "Store", "identity", "key_of"]

# Must change when results are computed differently, so that no older result is used.
METHOD = 2
# Below it a probability is no more than 2e-35, and rounding would eat the resolution of the rest.
FLOOR = -80.0
STEPS = 65_535
KEY = re.compile("[0-9a-f]{32}")
# What makes token ids of texts and conversations, and text of answers.
PROMPT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "openvino_tokenizer.xml",
    "openvino_tokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_detokenizer.bin",
)
# A reference that was not used for so long is deleted.
KEPT_S = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Expected:
    """A reference's answer for the scored tokens of one block.

    Attributes:
        codes: Log-probabilities as integers (tokens, vocab); times `-step` they are nats.
        step: Nats of one integer, for each token.
        top: The token ranked first.
        nll: Negative log-likelihood of the token that follows, nats.
    """

    codes: NDArray[np.uint16]
    step: NDArray[np.float32]
    top: NDArray[np.int32]
    nll: NDArray[np.float32]

    @classmethod
    def of(cls, log_p: NDArray[np.float32], following: NDArray[np.int64]) -> Expected:
        """Pack log-probabilities (tokens, vocab)."""
        import numpy as np

        bounded = np.maximum(log_p, FLOOR)
        step = np.maximum(-bounded.min(-1), 1e-3) / STEPS
        codes = np.rint(-bounded / step[:, None]).astype(np.uint16)
        rows = np.arange(len(log_p))
        return cls(codes, step.astype(np.float32), log_p.argmax(-1).astype(np.int32), -log_p[rows, following])

    def log_p(self, first: int, last: int) -> NDArray[np.float32]:
        """Log-probabilities of some of the tokens."""
        import numpy as np

        return self.codes[first:last].astype(np.float32) * -self.step[first:last, None]


class Store:
    """A folder of the cache with one file for each block.

    Args:
        kind: `reference` or `scores`.
        key: What the contents depend on, as `key_of` makes it.
    """

    def __init__(self, kind: str, key: str) -> None:
        root = cache_dir() / "evaluate" / kind
        self.folder = root / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OVAFMError(
                f"cannot write to the cache {root} ({error.strerror}); set OV_AFM_CACHE to a folder of yours",
                code="cache-unwritable",
            ) from error
        os.utime(self.folder)
        for other in root.iterdir():
            if KEY.fullmatch(other.name) and time.time() - other.stat().st_mtime > KEPT_S:
                shutil.rmtree(other, ignore_errors=True)

    def path(self, block: int) -> Path:
        """The file of a block."""
        return self.folder / f"{block:05d}.npz"

    def has(self, block: int) -> bool:
        """Whether a block is stored."""
        return self.path(block).exists()

    def check_room(self, block_bytes: int, blocks: int) -> None:
        """Check that all blocks fit on the disk.

        Raises:
            OVAFMError: They do not; with figures.
        """
        missing = sum(not self.has(block) for block in range(blocks))
        check_disk(self.folder, {"the reference's distributions": float(block_bytes * missing)})

    def read(self, block: int) -> dict[str, Any] | None:
        """The arrays of a block; None if it is missing, or damaged (then it is deleted)."""
        import numpy as np

        path = self.path(block)
        try:
            with np.load(path) as saved:
                return {name: saved[name] for name in saved.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError):
            path.unlink(missing_ok=True)
            return None

    def write(self, block: int, arrays: Expected | Scores) -> None:
        """Write a block, whole or not at all."""
        import numpy as np

        fields = {name: getattr(arrays, name) for name in arrays.__dataclass_fields__}
        with (
            disk_full_as_error(self.folder),
            replacing(self.path(block)) as temporary,
            temporary.open("wb") as stream,
        ):
            np.savez(stream, **fields)


class Journal:
    """Small results, appended to a file as they come, one JSON object a line; an incomplete last line is dropped.

    Args:
        kind: Name of their folder.
        key: What they depend on, as `key_of` makes it.
    """

    def __init__(self, kind: str, key: str) -> None:
        self._path = Store(kind, key).folder / "journal.jsonl"
        self.entries: dict[str, Any] = {}
        if self._path.exists():
            text = self._path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                write_text(self._path, whole)
            self.entries = {line["id"]: line["value"] for line in map(json.loads, whole.splitlines())}

    def add(self, id: str, value: Any) -> None:
        """Store a JSON value."""
        self.entries[id] = value
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"id": id, "value": value}) + "\n")


def key_of(**fields: Any) -> str:
    """A file name for a result that depends on these values, on how it is computed, and on OpenVINO."""
    versions = manifest.installed_versions()
    fields |= {"method": METHOD, "versions": [versions["openvino"], versions["openvino_genai"]]}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def identity(model: Path, progress: console.Progress) -> dict[str, str]:
    """sha256 of every file that determines a model's results, of its prompts too; of weights from its manifest.

    Args:
        model: Model directory or checkpoint folder.
        progress: Where to draw progress.
    """
    recorded: Mapping[str, Any] = {}
    if (model / manifest.MODEL_XML).exists():
        contents = manifest.verify(model)
        recorded = contents.files if contents else {}
        paths = [model / manifest.MODEL_XML, model / manifest.MODEL_BIN]
    else:
        paths = [model / "config.json", *sorted(model.glob("*.safetensors")), *sorted(model.glob("*.bin"))]
    # People may edit these, so that the manifest need not be right about them.
    prompts = [model / name for name in PROMPT_FILES if (model / name).is_file()]
    hashed = [*(path for path in paths if path.name not in recorded), *prompts]
    total = sum(path.stat().st_size for path in hashed)
    with progress.step(f"identifying {model.name}", total=total, unit="B") as advance:
        computed = {path.name: manifest.sha256(path, advance) for path in hashed}
    return {**{path.name: str(recorded[path.name]["sha256"]) for path in paths if path.name in recorded}, **computed}
