"""What the page offers and runs: the models found, the devices of this machine, and the one engine that is loaded."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OVAFMError
from ..model_dir.manifest import MODEL_XML, files_of
from ..model_dir.model_directory import ModelDirectory
from ..runtime import devices, generation_config
from ..runtime.rules import kind_of, violations
from ..system import console
from .backend import EMULATED, Backend, Info
from .engine import Choice, Engine
from .remote import Remote

__all__ = ["DeviceRow", "Model", "ModelManager", "find_models", "recommended_sampling"]

# What the sliders show where the model says nothing.
NEUTRAL_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}

# An engine that dies more often than this in that time is not started again by itself.
MAX_DEATHS = 3
DEATHS_WITHIN_S = 600.0


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory on offer.

    Attributes:
        path: Its absolute path, by which it is chosen.
        label: Name, recipe and size for people.
        directory: The directory.
    """

    path: str
    label: str
    directory: ModelDirectory


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
        SourceError: A path is not a whole model directory and holds none.
    """
    models: dict[str, Model] = {}
    for path in paths:
        inside = [] if Path(path, MODEL_XML).exists() else _models_in(Path(path))
        # A folder without any model is opened for its error, which has the reason.
        for model in inside or [_open(path)]:
            models.setdefault(model.path, model)
    return list(models.values())


def _models_in(folder: Path) -> list[Model]:
    models = []
    for file in sorted(folder.glob(f"*/{MODEL_XML}")):
        try:
            models.append(_open(file.parent))
        except OVAFMError as error:
            console.note(f"note: left out: {error}")
    return models


def _open(path: str | Path) -> Model:
    directory = ModelDirectory.open(path)
    size = sum(file.stat().st_size for file in files_of(directory.path))
    recipe = directory.recipe_name.replace("unknown", "unknown recipe")
    label = f"{directory.name} · {recipe} · {console.human_bytes(size)}"
    return Model(str(directory.path.resolve()), label, directory)


def recommended_sampling(folder: Path | None) -> dict[str, float]:
    """The sampling values that the makers of a model recommend; temperature 0 where they do not ask for sampling.

    Args:
        folder: The model directory; None where there is none.
    """
    fields: dict[str, Any] = {}
    # What is wrong with the file is said when the model is loaded.
    with contextlib.suppress(OVAFMError):
        fields = generation_config.read(folder) if folder else {}
    if not fields:
        return dict(NEUTRAL_SAMPLING)
    recommended = {name: max(0, fields.get(name, neutral)) for name, neutral in NEUTRAL_SAMPLING.items()}
    sampled = fields.get("do_sample", False) and not generation_config.is_greedy(fields)
    return recommended if sampled else {**recommended, "temperature": 0.0}


class ModelManager:
    """The one engine of the page, for all of its users, and what it may load.

    Args:
        models: Models on offer; empty for a server.
        device: The first device.
        options: More arguments of `Pipeline`.
        remote: A server instead of models.

    Attributes:
        reserved: What the machine is busy with; empty while it answers.
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
        self._prompt_lookup = bool(self._options.pop("prompt_lookup", False))
        self._lock = threading.Lock()
        self._deaths: list[float] = []
        self.reserved = ""
        self.first_device = device
        self.engine: Engine | None = None
        if remote is None:
            self.start(self.choice(self.models[0].path, device))
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
        if self.reserved:
            raise ConfigError(f"the machine is busy with {self.reserved}; ask again when it is done", code="busy")
        backend: Backend | None = self.remote or self.engine
        assert backend is not None
        return backend

    @property
    def info(self) -> Info:
        """What answers now."""
        return (self.remote or self.engine).info  # type: ignore[union-attr]

    @property
    def loaded(self) -> Model | None:
        """The model that is loaded; None with a server."""
        return self._model(self.engine.choice.model_dir) if self.engine else None

    def _model(self, model_dir: str) -> Model | None:
        return next((each for each in self.models if each.path == model_dir), None)

    @property
    def choices(self) -> list[tuple[str, str]]:
        """Label and path of each model on offer."""
        return [(each.label, each.path) for each in self.models]

    def choice(self, model_dir: str, device: str, *, prompt_lookup: bool | None = None) -> Choice:
        """A choice among what is on offer.

        Raises:
            ConfigError: The model is not on offer.
            DeviceError: The device cannot run its recipe.
        """
        model = self._model(model_dir)
        if model is None:
            raise ConfigError(f"no model {Path(model_dir).name!r} on offer here", code="model-unknown")
        devices.choose(device, model.directory.recipe)
        return Choice(model_dir, device, self._prompt_lookup if prompt_lookup is None else prompt_lookup, self._options)

    def start(self, choice: Choice) -> None:
        """Unload what is loaded and begin to load something else."""
        with self._lock:
            if self.engine:
                self.engine.close()
            self.engine = Engine(choice)

    def restart(self) -> None:
        """Load the same once more."""
        assert self.engine is not None
        self._deaths = []
        self.start(self.engine.choice)

    def revive(self, lost: object) -> bool:
        """Load the same once more after its process died.

        Args:
            lost: The engine that was lost; nothing happens if another one runs by now.

        Returns:
            Whether an engine is there or on its way: one that dies too often stays dead until somebody starts it.
        """
        with self._lock:
            if self.engine is None or self.reserved:
                return False
            if self.engine is not lost or self.engine.state != "dead":
                return self.engine is not lost
            now = time.monotonic()
            self._deaths = [each for each in self._deaths if now - each < DEATHS_WITHIN_S] + [now]
            if len(self._deaths) > MAX_DEATHS or not self.engine.loaded_s:
                return False
            self.engine.close()
            self.engine = Engine(self.engine.choice)
            return True

    @contextlib.contextmanager
    def reserve(self, purpose: str) -> Iterator[None]:
        """While the block runs, a measurement has the machine for itself: the engine is unloaded, and loaded again.

        Raises:
            ConfigError: Another measurement has it.
        """
        with self._lock:
            if self.reserved:
                raise ConfigError(f"the machine is busy with {self.reserved}; try again when it is done", code="busy")
            self.reserved = purpose
            if self.engine:
                self.engine.close()
        try:
            yield
        finally:
            self.reserved = ""
            if self.engine:
                self.restart()

    def device_rows(self, model_dir: str) -> list[DeviceRow]:
        """The devices of this machine for a model, the emulated NPU included."""
        model = self._model(model_dir)
        recipe = model.directory.recipe if model else None
        rows = []
        for device in self._inventory.devices:
            broken = violations(recipe, device.name) if recipe else []
            reasons = [f"cannot run {rule.problem(recipe)}, needs {rule.needs}" for rule in broken if recipe]
            rows.append(DeviceRow(device.name, f"{device.name} – {device.full_name}", "; ".join(reasons)))
        for kind, fault in self._inventory.faults.items():
            rows.append(DeviceRow(kind, kind, f"the driver did not answer: {fault}"))
        present = {kind_of(row.name) for row in rows}
        rows += [DeviceRow(kind, kind, "not in this machine") for kind in devices.KINDS if kind not in present]
        return [*rows, DeviceRow(devices.EMULATED_NPU, EMULATED)]

    @property
    def problem(self) -> str:
        """Why the engine is dead; empty while it is not."""
        return self.engine.problem if self.engine and self.engine.state == "dead" else ""

    @property
    def loading(self) -> tuple[str, float, float | None] | None:
        """The step of loading, its seconds so far and those of last time; None while nothing is loaded."""
        return self.engine.progress if self.engine and self.engine.state == "loading" else None

    def close(self) -> None:
        """End the engine."""
        for each in (self.engine, self.remote):
            if each:
                each.close()
