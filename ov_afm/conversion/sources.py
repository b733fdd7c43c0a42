"""From the name that a user gives to a model on this disk: Hub id, folder, GGUF file, or the embedded model.

`resolve` finds or fetches the model and checks what can be checked cheaply (architecture, tokenizer, length of every
weight file). Nothing that comes with a model is executed: pickles and `auto_map` code are refused unless the caller
allows them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import SourceError
from ..model_dir import manifest
from ..model_dir.geometry import Geometry
from ..model_dir.manifest import MODEL_BIN, MODEL_XML
from ..model_dir.outputs import SYNTHETIC_KEY
from ..model_dir.text_encoder import POOLING_FILE, TEXT_GENERATION
from ..presets import DEFAULT_MODEL, EMBEDDED_MODEL
from ..runtime import chat_template, generation_config
from ..runtime.lora import Adapter
from ..system.console import Progress
from ..system.paths import expanded
from . import checkpoint, embedded, hub

__all__ = ["Source", "resolve"]

Kind = Literal["hub", "folder", "gguf", "embedded", "openvino"]
# Files of a checkpoint that shape an export, besides weights and license files. All of a kind count, because
# transformers chooses among several names (`tokenizer.4.0.json`).
SHAPING = (
    "*.json",
    POOLING_FILE,
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "*.py",
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Source:
    """A model on this disk, and where it came from.

    Attributes:
        kind: `hub`, `folder`, `gguf`, `embedded`; `openvino` for an OpenVINO model that is taken as it is.
        id: Name of the model without any path of this machine: Hub id, name, folder or file name.
        path: Folder with the Hugging Face checkpoint, or with the OpenVINO model.
        revision: Commit of the Hub repository; None elsewhere.
        license: Identifier from the model card or the GGUF metadata; None where unknown.
        license_files: LICENSE, NOTICE, USE_POLICY and the like.
        weights: Weight files as they came; of a GGUF source the `.gguf` files, not what was made from them.
        config: Contents of `config.json`.
        synthetic: The weights are random, made by `ov-afm synth`.
        digests: sha256 by file name where it has been computed and checked.
        adapters: LoRA adapters that are to be merged into it.
    """

    kind: Kind
    id: str
    path: Path
    revision: str | None
    license: str | None
    license_files: tuple[Path, ...]
    weights: tuple[Path, ...]
    config: Mapping[str, Any]
    synthetic: bool
    digests: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()

    @property
    def prebuilt(self) -> bool:
        """Whether this is an OpenVINO model, to be taken as it is."""
        return self.kind == "openvino"

    @property
    def geometry(self) -> Geometry:
        """The model's shape."""
        return Geometry.from_config(self.config)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, and stays so with the adapters."""
        return bool(self.config.get("tie_word_embeddings")) and not any(each.unties for each in self.adapters)

    @property
    def parameters(self) -> int:
        """Weights of the model, norms left out."""
        return self.geometry.parameters(tied=self.tied)

    @property
    def files(self) -> dict[str, Path]:
        """Files that shape an export beside the weights, by their path in the source."""
        if self.kind in ("gguf", "embedded"):
            return {path.name: path for path in self.license_files}
        if self.prebuilt:
            made_anew = (manifest.FILE_NAME, manifest.CARD_FILE)
            found = [path for path in manifest.files_of(self.path) if path.name not in made_anew]
        else:
            found = [*(path for pattern in SHAPING for path in self.path.glob(pattern)), *self.license_files]
        chosen = {path.relative_to(self.path).as_posix(): path for path in sorted(found) if path.is_file()}
        return {name: path for name, path in chosen.items() if path not in self.weights}

    def stored_bytes(self) -> int:
        """Size of the weights that are loaded; of a GGUF source, those of the checkpoint that was made from it."""
        return sum(path.stat().st_size for path in checkpoint.find_weights(self.path, allow_pickle=True))

    def describe(self, on_bytes: Callable[[int], None] | None = None) -> dict[str, Any]:
        """The manifest's `source`; hashes all files, `on_bytes` gets the size of each block of the weights read."""
        fields: dict[str, Any] = {
            "kind": self.kind,
            "id": self.id,
            "revision": self.revision,
            "license": self.license,
            "weights": {
                path.name: self.digests.get(path.name) or manifest.sha256(path, on_bytes) for path in self.weights
            },
            "files": {name: manifest.sha256(path) for name, path in self.files.items()},
        }
        if self.synthetic:
            fields["synthetic"] = True
        if self.adapters:
            fields["adapters"] = [adapter.describe() for adapter in self.adapters]
        return fields


def resolve(
    model: str | Path,
    revision: str | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    task: str = TEXT_GENERATION,
    progress: Progress | None = None,
) -> Source:
    """Find or fetch a model.

    Args:
        model: Hub id (`org/name`), checkpoint folder, OpenVINO model folder, `.gguf` file, or the name
            of the embedded model. Something that exists on this disk is taken before a Hub id.
        revision: Branch, tag or commit; Hub ids only.
        allow_pickle: Accept pickled weights, which can run code when they are loaded.
        trust_remote_code: Accept a model that brings its own Python code.
        task: What the model is for.
        progress: Where to show downloads and conversions.

    Returns:
        The model on this disk.

    Raises:
        SourceError: It cannot be found, fetched, read or trusted; the message says which and what to do.
    """
    name = os.fspath(model)
    path = expanded(name)
    trust: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code, "task": task}
    if not name.strip():
        raise SourceError(
            f"no model was named; give a Hub id such as {DEFAULT_MODEL}, a folder, a .gguf file or {EMBEDDED_MODEL}",
            code="source-unnamed",
        )
    if revision is not None and (path.exists() or not HUB_ID.fullmatch(name)):
        raise SourceError(
            f"a revision ({revision}) only applies to a Hub id, and {name} is none; leave --revision out",
            code="revision-without-hub",
        )
    if path.is_dir():
        if (path / MODEL_XML).is_file():
            return _prebuilt(path, id=path.resolve().name)
        return _checkpoint(path, "folder", path.resolve().name, **trust)
    if path.is_file():
        return _gguf(path, progress)
    if name == EMBEDDED_MODEL:
        return _embedded(progress)
    if _looks_like_path(name, model):
        raise SourceError(f"no such file or folder: {path}", code="source-missing")
    if HUB_ID.fullmatch(name):
        return _hub(name, revision, progress, **trust)
    raise SourceError(
        f"no model {name!r}: it is no folder or .gguf file here, and no Hub id (org/name, such as {DEFAULT_MODEL}); "
        f"the embedded model is called {EMBEDDED_MODEL}",
        code="source-unknown",
    )


def _looks_like_path(name: str, model: str | Path) -> bool:
    return (
        isinstance(model, Path)
        or name.startswith((".", "/", "~"))
        or "\\" in name
        or name.lower().endswith(".gguf")
        or re.match(r"[A-Za-z]:", name) is not None
    )


def _hub(repo: str, revision: str | None, progress: Progress | None, **trust: Any) -> Source:
    snapshot = hub.fetch(repo, revision, progress=progress, **trust)
    prebuilt = (snapshot.path / MODEL_XML).exists()
    source = _prebuilt(snapshot.path, id=repo) if prebuilt else _checkpoint(snapshot.path, "hub", repo, **trust)
    return replace(source, revision=snapshot.commit, digests=snapshot.digests)


def _checkpoint(path: Path, kind: Kind, id: str, *, allow_pickle: bool, trust_remote_code: bool, task: str) -> Source:
    if not (path / "config.json").is_file():
        raise SourceError(
            f"{path} is no checkpoint: config.json is missing; give the folder that holds config.json and the weights",
            code="config-missing",
        )
    config = checkpoint.read_json(path / "config.json")
    checkpoint.check_config(config, id, trust_remote_code=trust_remote_code, task=task)
    weights = checkpoint.find_weights(path, allow_pickle=allow_pickle)
    checkpoint.check_tokenizer(path, trust_remote_code=trust_remote_code)
    # What cannot be read, or leaves open what is meant, is refused before any work.
    generation_config.read(path)
    chat_template.notes(path)
    return _source(kind, id, path, weights, config)


def _prebuilt(path: Path, *, id: str) -> Source:
    for needed in (MODEL_BIN, "config.json"):
        if not (path / needed).is_file():
            raise SourceError(
                f"{path} is no whole OpenVINO model: {needed} is missing; fetch or export it again",
                code="prebuilt-incomplete",
            )
    config = checkpoint.read_json(path / "config.json")
    return _source("openvino", id, path, (path / MODEL_BIN,), config)


def _source(
    kind: Kind, id: str, path: Path, weights: tuple[Path, ...], config: Mapping[str, Any], terms: Path | None = None
) -> Source:
    return Source(
        kind=kind,
        id=id,
        path=path,
        revision=None,
        license=checkpoint.license_in_card(path),
        license_files=checkpoint.license_files(terms or path),
        weights=weights,
        config=config,
        synthetic=config.get(SYNTHETIC_KEY) is True,
    )


def _gguf(path: Path, progress: Progress | None) -> Source:
    if path.suffix.lower() != ".gguf":
        raise SourceError(
            f"{path} is a file, but no .gguf file; give a checkpoint folder, a .gguf file or a Hub id",
            code="source-is-other-file",
        )
    return _from_gguf(path, kind="gguf", id=None, progress=progress)


def _embedded(progress: Progress | None) -> Source:
    with hub.byte_progress(progress, "downloading") as advance:
        path = embedded.fetch(lambda done, total: advance(to=done, total=total))
    return _from_gguf(path, kind="embedded", id=EMBEDDED_MODEL, progress=progress)


def _from_gguf(path: Path, *, kind: Kind, id: str | None, progress: Progress | None) -> Source:
    # It needs numpy, which commands that only ask for a source's name do not.
    from .gguf import weights

    files = weights.parts(path)
    with hub.byte_progress(progress, "hashing the source", sum(file.stat().st_size for file in files)) as advance:
        digests = {file.name: manifest.sha256(file, advance) for file in files}
    with hub.byte_progress(progress, "converting GGUF") as advance:
        folder = weights.convert_cached(path, [*digests.values()], lambda done, total: advance(done, total=total))
    checkpoint.find_weights(folder)
    chat_template.notes(folder)
    config = checkpoint.read_json(folder / "config.json")
    # The licence texts of a GGUF file are those that lie beside it.
    source = _source(kind, id or weights.model_name(path), folder, files, config, terms=path.parent)
    return replace(source, digests=digests)
