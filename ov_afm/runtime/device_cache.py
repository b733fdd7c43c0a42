"""What this machine keeps of its devices: compiled models, self-test verdicts, load times, speeds.

A compiled model is good for one model, device, driver, OpenVINO version and set of properties;
OpenVINO's own key knows less than that, so each combination gets a folder of its own. Everything
here can be computed again: `ov-afm devices --clear-cache` deletes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..model_dir import manifest
from ..system import paths
from ..system.atomic import write_json
from ..system.json_text import parse

__all__ = ["clear", "compiled_dir", "read", "remember", "speeds", "state_key"]

# Properties that do not change what is compiled.
_NOT_COMPILED = ("CACHE_DIR", "scheduler_config", "draft_model", "prompt_lookup")
# Names of the folders of compiled models, as `state_key` makes them.
KEY = re.compile("[0-9a-f]{16}")


def state_key(model: str, device: str, driver: str | None, properties: Mapping[str, Any]) -> str:
    """Digest of everything that a compiled model depends on.

    Args:
        model: The model's key (`ModelDirectory.key`).
        device: The device's full name, so that another card is another key.
        driver: Its driver version.
        properties: What it is loaded with.
    """
    used = {key: str(value) for key, value in sorted(properties.items()) if key not in _NOT_COMPILED}
    parts = [model, device, driver, manifest.installed_versions()["openvino"], used]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def compiled_dir(key: str) -> Path:
    """The folder for a compiled model."""
    return paths.cache_dir() / "compiled" / key


def clear() -> int:
    """Delete compiled models and all entries; returns the bytes freed."""
    # A user may have set the cache folder to one that holds more than ours.
    folders = [path for path in (paths.cache_dir() / "compiled").glob("*") if KEY.fullmatch(path.name)]
    freed = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    _path().unlink(missing_ok=True)
    return freed


def read(section: str) -> dict[str, Any]:
    """A section: `verdicts`, `golden`, `load_s` or `tpot_ms`; empty if there is none or the file is damaged."""
    entries = _all().get(section, {})
    return entries if isinstance(entries, dict) else {}


def remember(section: str, key: str, value: Any) -> None:
    """Set an entry. Two processes at once may lose one of their entries, never the file."""
    contents = _all()
    contents.setdefault(section, {})[key] = value
    # A home that is read-only, or none, must not prevent a model from running: it will be tested and timed again.
    with contextlib.suppress(OSError, ConfigError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, contents, indent=1)


def speeds(model: str) -> dict[str, float]:
    """Device to measured milliseconds a token, of a model on this machine.

    Written by benchmarks with `remember("tpot_ms", f"{model}/{device}", value)`.
    """
    entries = read("tpot_ms")
    return {key.partition("/")[2]: float(value) for key, value in entries.items() if key.startswith(f"{model}/")}


def _path() -> Path:
    return paths.cache_dir() / "devices.json"


def _all() -> dict[str, Any]:
    try:
        contents = parse(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a missing home folder is a `ValueError`, too
        return {}
    return contents if isinstance(contents, dict) else {}
