"""Where results may be written: what is the user's is never replaced, what is ours only on request.

Every command that makes a folder gets it from `new_folder`, every command that writes one file asks
`check_file` first. A folder is ours when its manifest, its OpenVINO model or the record of `prune` or `synth` shows it,
and nothing else lies in it. What a command reads from, and the caches of ov_afm and of the Hub, are refused by identity
rather than by name, so that links, `..` and the case of letters make no difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SourceError
from ..system.atomic import staging
from ..system.json_text import parse
from ..system.paths import cache_dir, data_dir
from . import manifest

__all__ = ["PRUNED_FILE", "SYNTHETIC_KEY", "check", "check_file", "check_packed", "new_folder"]

# What `prune` writes beside a checkpoint, and what `synth` writes into the configuration of one.
PRUNED_FILE = "ov_afm_prune.json"
SYNTHETIC_KEY = "ov_afm_synthetic"
# Names that a model directory or a checkpoint of ours may hold, whether its manifest can be read or not.
SYSTEM_FILES = r"\.DS_Store|Thumbs\.db|desktop\.ini|\.gitattributes"
TEXTS = (
    r"config\.json|generation_config\.json|chat_template\.json|.+\.jinja|README\.md|"
    r"(added_tokens|special_tokens_map|tokenizer|tokenizer_config|vocab|openvino_config|preprocessor_config)\.json|"
    r"merges\.txt|vocab\.txt|[\w.-]+\.model|(licen[cs]e|notice|copying|use_policy|acceptable_use)[\w.-]*"
)
MODEL_NAMES = re.compile(
    rf"{SYSTEM_FILES}|{TEXTS}|openvino_[\w-]+\.(xml|bin)|{re.escape(manifest.FILE_NAME)}|graph\.pbtxt", re.IGNORECASE
)
CHECKPOINT_NAMES = re.compile(
    rf"{SYSTEM_FILES}|{TEXTS}|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    rf"{re.escape(PRUNED_FILE)}",
    re.IGNORECASE,
)
# Folders of a model directory, with such files alone.
FOLDERS = (manifest.PACKED_FOLDER, "additional_chat_templates")
# What a killed run of `staging` left.
LEFTOVERS = re.compile(r"\..+\.ov-afm\.(partial|old|lock)")
OTHER_OUTPUT = "choose another output directory"


@contextmanager
def new_folder(output: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Yield an empty folder to work in that becomes `output` when the block ends without an exception.

    An older folder of ours stays in its place until the new one is complete.

    Args:
        output: The new model directory or checkpoint.
        force: Replace a model directory, or a checkpoint of `prune` or `synth`.
        inputs: Files and folders that the work reads; names that are no path are left out.

    Raises:
        ConfigError: `output` must not or cannot be written.
        OVAFMError: Another process is writing it.
    """
    target = Path(output)
    check(target, force=force, inputs=inputs)
    with staging(target, replace=force, check=_check_ours) as partial:
        yield partial


def check(output: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse an output, before any work, that would cost the user something.

    Raises:
        ConfigError: It is, or holds, one of `inputs` or a cache; it lies in a model directory or in a cache; or
            `force` would replace what is not ours.
    """
    target = _resolved(output)
    for each in inputs:
        with suppress(RuntimeError):  # `~name` of nobody
            path = Path(each).expanduser()
            if _exists(path):
                _check_input(target, path)
    for kind, cache, managed in _caches():
        inside = target.relative_to(cache).parts if target.is_relative_to(cache) else ()
        if (cache.exists() and _contains(target, cache)) or (inside and re.fullmatch(managed, inside[0])):
            raise ConfigError(
                f"{target} is, holds or lies in the {kind} ({cache}); {OTHER_OUTPUT}", code="output-is-cache"
            )
    if force and target.is_dir() and any(target.iterdir()):
        _check_ours(target)


def check_file(path: str | Path, *, ours: Callable[[bytes], bool], what: str) -> None:
    """Refuse a file as output that exists and was not written by ov_afm.

    Args:
        path: The file.
        ours: Whether the contents of an existing file are a result of the same command.
        what: What is written, for the message, such as "a recipe of ov-afm tune".

    Raises:
        ConfigError: It exists and is not `ours`.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file for {what}", code="output-is-folder")
    if path.exists() and path.stat().st_size and not ours(path.read_bytes()):
        raise ConfigError(
            f"{path} exists and is not {what}; it stays as it is, choose another file name", code="output-foreign"
        )


def check_packed(model_dir: Path) -> None:
    """Refuse to replace or delete a `relu2/` folder in which something else lies than a packed model.

    Raises:
        ConfigError: Names what else lies there, or what it is.
    """
    folder = model_dir / manifest.PACKED_FOLDER
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{folder} is a link or a file and stays as it is; move it away", code="packed-holds-other")
    known = _listed(model_dir)
    for path in sorted(folder.iterdir()):
        name = f"{manifest.PACKED_FOLDER}/{path.name}"
        if not (path.is_file() and (name in known or path.name in known or MODEL_NAMES.fullmatch(path.name))):
            raise ConfigError(
                f"{path} is no part of a packed model, so {folder} stays as it is; move it away",
                code="packed-holds-other",
            )


def _check_input(target: Path, path: Path) -> None:
    """Refuse an output that is or holds an input, or lies in an input that is a model directory."""
    if _same(target, path):
        raise ConfigError(f"{target} is what the command reads ({path}); {OTHER_OUTPUT}", code="output-is-input")
    if _contains(target, path):
        raise ConfigError(f"{target} holds what the command reads ({path}); {OTHER_OUTPUT}", code="output-holds-input")
    # What is replaced or copied as a whole must not hold other results.
    if (path / manifest.MODEL_XML).exists() and _contains(path, target):
        raise ConfigError(f"{target} lies in the model directory {path}; {OTHER_OUTPUT}", code="output-in-input")


def _check_ours(folder: Path) -> None:
    """Refuse to replace a folder that is not ours, or in which something else lies.

    Raises:
        ConfigError: Names what lies there.
    """
    if (folder / manifest.FILE_NAME).is_file() or (folder / manifest.MODEL_XML).is_file():
        other = _first_other(folder, MODEL_NAMES, _listed(folder))
    elif (folder / PRUNED_FILE).is_file() or _is_synthetic(folder):
        other = _first_other(folder, CHECKPOINT_NAMES, frozenset())
    else:
        raise ConfigError(
            f"{folder} is no model directory of ov_afm, and --force replaces nothing else; {OTHER_OUTPUT}",
            code="output-not-ours",
        )
    if other is not None:
        raise ConfigError(
            f"{folder} holds {other}, which is no part of the model, so it is not replaced; "
            f"move {other} away, or {OTHER_OUTPUT}",
            code="output-holds-other",
        )


def _first_other(folder: Path, names: re.Pattern[str], listed: frozenset[str]) -> str | None:
    """The first entry of a folder that is no part of the model in it; None where all are."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        top, _, rest = name.partition("/")
        if (
            top == ".cache"
            or LEFTOVERS.fullmatch(top)
            or (path.is_dir() and (name in FOLDERS or _has_listed(name, listed)))
        ):
            continue
        known = rest if top in FOLDERS else name
        if name not in listed and not (path.is_file() and names.fullmatch(known)):
            return name
    return None


def _has_listed(folder: str, listed: frozenset[str]) -> bool:
    return any(name.startswith(f"{folder}/") for name in listed)


def _listed(folder: Path) -> frozenset[str]:
    """Files that a folder's manifest names; none where it has no manifest, or a damaged one."""
    try:
        contents = manifest.read(folder)
    except SourceError:
        return frozenset()
    return frozenset(contents.files if contents else ())


def _is_synthetic(folder: Path) -> bool:
    with suppress(OSError, ValueError):
        config: Any = parse((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and config.get(SYNTHETIC_KEY) is True
    return False


def _caches() -> Iterator[tuple[str, Path, str]]:
    """Folders that programs manage: what each is, the folder, and the names of what is managed in it."""
    with suppress(ConfigError):  # no home folder, so nothing lies there
        yield "cache of ov_afm", cache_dir().resolve(), "calibration|compiled|embedded|evaluate|gguf|kernels|logs"
    with suppress(ConfigError):
        yield "data folder of ov_afm", data_dir().resolve(), "reports"
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    with suppress(RuntimeError):  # no home folder
        yield "cache of the Hub", hub.expanduser().resolve(), r"(models|datasets|spaces)--.+|\.locks"


# -- Paths by identity


def _resolved(path: str | Path) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ConfigError(f"{path} cannot be followed ({error}); {OTHER_OUTPUT}", code="output-unwritable") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # unreadable, or no path at all
        return False


def _same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _contains(folder: Path, path: Path) -> bool:
    """Whether a path is a folder, or lies in it, as it is written or where its links lead."""
    return any(_same(folder, each) for way in (path.absolute(), path.resolve()) for each in (way, *way.parents))
