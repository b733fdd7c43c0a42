"""What the page offers and runs: the models found, the devices of this machine, and the one engine that is loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SourceError
from ..model_dir import manifest
from ..runtime import devices
from ..runtime.loading import locate, recipe_of
from ..runtime.rules import violations
from ..system import console
from .backend import Backend, Info
from .engine import Choice, Engine
from .remote import Remote
from .strings import TEXTS

__all__ = ["DeviceRow", "Host", "Model", "find_models", "recommended"]

MODEL_FILE = "openvino_model.xml"
# What the sliders show where the model says nothing; a model that does not ask for sampling is run greedily.
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory on offer.

    Attributes:
        path: The directory.
        label: Name, recipe and size for people.
        contents: Its manifest; None where it has none.
    """

    path: Path
    label: str
    contents: manifest.Manifest | None


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device, as a choice for one model.

    Attributes:
        name: What to load on.
        label: Name with what the vendor calls it.
        refused: Why this model cannot run there; empty where it can.
    """

    name: str
    label: str
    refused: str = ""


def find_models(paths: Iterable[str]) -> list[Model]:
    """The model directories among some paths and directly in them; broken ones in a folder of them are left out.

    Raises:
        SourceError: A path is no whole model directory and holds none.
    """
    found: dict[Path, Model] = {}
    for each in paths:
        path = locate(each)
        inside = [] if (path / MODEL_FILE).exists() else _inside(path)
        # A folder without any model says what is wrong with it.
        for model in inside or [_describe(path.resolve())]:
            found.setdefault(model.path, model)
    return list(found.values())


def _inside(folder: Path) -> list[Model]:
    models = []
    for file in sorted(folder.glob(f"*/{MODEL_FILE}")):
        try:
            models.append(_describe(file.parent.resolve()))
        except SourceError as error:
            console.note(f"note: left out: {error}")
    return models


def _describe(folder: Path) -> Model:
    contents = manifest.verify(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    recipe = contents.recipe.get("name") if contents else None
    return Model(folder, f"{folder.name} · {recipe or 'unknown recipe'} · {console.human_bytes(size)}", contents)


def recommended(folder: Path | None) -> dict[str, float]:
    """The sampling values that a model's makers recommend."""
    import json

    path = folder / "generation_config.json" if folder else None
    if path is None or not path.exists():
        return dict(PLAIN)
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return dict(PLAIN)
    values = {name: fields.get(name, plain) for name, plain in PLAIN.items()}
    numbers = {name: value if isinstance(value, (int, float)) else PLAIN[name] for name, value in values.items()}
    return numbers if fields.get("do_sample") is True else {**numbers, "temperature": 0.0}


class Host:
    """The engine of the page, for all of its users.

    Args:
        models: Models on offer; empty for a server.
        device: The first device.
        options: More arguments of `Pipeline`.
        remote: A server instead of models.
    """

    def __init__(
        self,
        models: Sequence[Model],
        device: str = "CPU",
        options: Mapping[str, Any] | None = None,
        remote: Remote | None = None,
    ) -> None:
        self.models = list(models)
        self.remote = remote
        self._options = dict(options or {})
        self._lookup = bool(self._options.pop("prompt_lookup", False))
        self._lock = threading.Lock()
        self._reserved = ""
        self.first_device = device
        self.engine: Engine | None = None
        if remote is None:
            self.start(self.choice(str(self.models[0].path), device))
            threading.Thread(target=lambda: self._inventory, daemon=True).start()

    @cached_property
    def _inventory(self) -> devices.Inventory:
        return devices.inventory()

    @property
    def backend(self) -> Backend:
        """What answers.

        Raises:
            ConfigError: Nothing does, because a comparison or a measurement has the machine.
        """
        if self._reserved:
            raise ConfigError(f"the machine is busy with {self._reserved}; ask again when it is done")
        found: Backend | None = self.remote or self.engine
        assert found is not None
        return found

    @property
    def info(self) -> Info:
        """What answers now."""
        return (self.remote or self.engine).info  # type: ignore[union-attr]

    @property
    def model(self) -> Model | None:
        """The model that is loaded."""
        if self.engine is None:
            return None
        return next(each for each in self.models if str(each.path) == self.engine.choice.model_dir)

    def choice(self, model_dir: str, device: str, *, prompt_lookup: bool | None = None) -> Choice:
        """A choice among what is on offer.

        Raises:
            ConfigError: The model is none of those on offer.
            DeviceError: The device cannot run its recipe.
        """
        model = next((each for each in self.models if str(each.path) == model_dir), None)
        if model is None:
            raise ConfigError(f"no model {Path(model_dir).name!r} on offer here")
        devices.choose(device, recipe_of(model.contents))
        return Choice(model_dir, device, self._lookup if prompt_lookup is None else prompt_lookup, self._options)

    def start(self, choice: Choice) -> Engine:
        """Unload what is loaded and begin to load something else."""
        with self._lock:
            if self.engine:
                self.engine.close()
            self.engine = Engine(choice)
            return self.engine

    def restart(self) -> None:
        """Load the same once more."""
        assert self.engine is not None
        self.start(self.engine.choice)

    def reserve(self, purpose: str) -> None:
        """Unload the engine and keep it away, so that a measurement has the machine for itself.

        Raises:
            ConfigError: Another measurement has it.
        """
        with self._lock:
            if self._reserved:
                raise ConfigError(f"the machine is busy with {self._reserved}; try again when it is done")
            self._reserved = purpose
            if self.engine:
                self.engine.close()

    def release(self) -> None:
        """Load again what was loaded before."""
        self._reserved = ""
        if self.engine:
            self.restart()

    @property
    def reserved(self) -> str:
        """What the machine is busy with; empty while it answers."""
        return self._reserved

    def device_rows(self, model_dir: str) -> list[DeviceRow]:
        """The devices of this machine for a model, the emulated NPU included."""
        model = next((each for each in self.models if str(each.path) == model_dir), None)
        recipe = recipe_of(model.contents) if model else None
        rows = []
        for found in self._inventory.devices:
            broken = violations(recipe, found.name) if recipe else []
            reasons = [TEXTS.refused.format(found=rule.found(recipe), needs=rule.needs) for rule in broken if recipe]
            rows.append(DeviceRow(found.name, f"{found.name} – {found.full_name}", "; ".join(reasons)))
        rows += [
            DeviceRow(kind, kind, TEXTS.not_asked.format(fault=fault)) for kind, fault in self._inventory.faults.items()
        ]
        here = {devices.kind_of(row.name) for row in rows}
        rows += [DeviceRow(kind, kind, TEXTS.not_here) for kind in devices.KINDS if kind not in here]
        return [*rows, DeviceRow(devices.EMULATED_NPU, TEXTS.emulated)]

    def problem(self) -> str:
        """Why the engine is dead; empty while it is not."""
        return self.engine.problem if self.engine and self.engine.state == "dead" else ""

    def loading(self) -> tuple[str, float, float | None] | None:
        """The step of loading, its seconds so far and those of last time; None while nothing is loaded."""
        engine = self.engine
        if engine is None or engine.state != "loading":
            return None
        return engine.progress

    def close(self) -> None:
        """End the engine."""
        for each in (self.engine, self.remote):
            if each:
                each.close()
