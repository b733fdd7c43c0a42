"""What a comparison runs: models, devices, prompt lengths and engine options, and what cannot run.

A combination that cannot run is not left out: it becomes a row with the reason, because "the NPU
does not take INT8" is an answer too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DeviceError, SourceError
from ..kernels import select
from ..model_dir.model_directory import ModelDirectory
from ..runtime import devices
from ..runtime.properties import Use
from ..runtime.rules import kind_of
from .prompts import KINDS

__all__ = ["OPTIONS", "Combination", "Model", "Option", "Settings", "combinations", "obstacle", "read_models"]


@dataclass(frozen=True, slots=True)
class Option:
    """A way to run the engine that is compared with the plain one.

    Attributes:
        name: Column heading.
        use: What it changes of what the model is loaded for.
        drafts: Tokens are drafted, from the prompt or by a draft model.
        on_npu: The NPU has it.
        env: Environment of its process.
    """

    name: str
    use: Mapping[str, Any] = field(default_factory=dict)
    drafts: bool = False
    on_npu: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option("plain", on_npu=True),
        Option("prompt-lookup", drafts=True),
        Option("draft", drafts=True),
        Option("kv-u8", {"kv_cache": "u8"}),
        Option("kv-f16", {"kv_cache": "f16"}),
        Option("prefix-cache", {"prefix_caching": True}, on_npu=True),
        Option("no-prefix-cache", {"prefix_caching": False}, on_npu=True),
        Option("no-kernels", env={select.DISABLE: "1"}),
    )
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, for every model alike.

    Attributes:
        devices: Devices to compare; empty for all of this machine.
        prompt_tokens: Prompt lengths.
        new_tokens: Tokens to generate after each prompt.
        runs: Measured runs of a combination, after a warm-up.
        concurrency: Requests at a time; more than one runs on continuous batching.
        options: Engine options to compare with the plain engine, at one request a time.
        draft_model: Model directory that drafts, for option `draft`.
        num_assistant_tokens: Tokens drafted at a time.
        threads: CPU threads; None for as many as there are physical cores.
        prompts: `text` or `random`.
        seed: Of the prompts.
        properties: OpenVINO properties, passed on unchanged.
    """

    devices: tuple[str, ...] = ()
    prompt_tokens: tuple[int, ...] = (32, 256, 1024)
    new_tokens: int = 128
    runs: int = 5
    concurrency: tuple[int, ...] = (1,)
    options: tuple[str, ...] = ()
    draft_model: str | None = None
    num_assistant_tokens: int = 5
    threads: int | None = None
    prompts: str = "text"
    seed: int = 0
    properties: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no sweep could run.

        Raises:
            ConfigError: Names the option and the value found.
        """
        for name in ("prompt_tokens", "concurrency"):
            if not getattr(self, name):
                raise ConfigError(f"{name} needs at least one value, found none")
        for name in ("runs", "new_tokens", "num_assistant_tokens", "prompt_tokens", "concurrency", "threads"):
            given, least = getattr(self, name), 2 if name == "new_tokens" else 1
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and value < least:
                    raise ConfigError(f"{name} must be at least {least}, found {value}")
        unknown = [name for name in self.options if name not in OPTIONS]
        if unknown:
            raise ConfigError(f"option {unknown[0]!r} is unknown; choose of {', '.join(OPTIONS)}")
        if "draft" in self.options and self.draft_model is None:
            raise ConfigError("option draft needs a draft model; add: --draft-model DIR")
        if self.prompts not in KINDS:
            raise ConfigError(f"prompts must be one of {', '.join(KINDS)}, found {self.prompts!r}")


@dataclass(frozen=True, slots=True)
class Model:
    """A model to measure.

    Attributes:
        directory: Its model directory.
        name: The folder's name, made unique among the models that are compared.
    """

    directory: ModelDirectory
    name: str

    def describe(self) -> dict[str, Any]:
        """What every record says of the model."""
        contents = self.directory.manifest
        recipe = contents.recipe if contents else {}
        checks = self.directory.checks.get("compression", {})
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        return {
            "model": self.name,
            "model_sha256": self.directory.key,
            "architecture": self.directory.geometry.architecture,
            "recipe": recipe.get("name"),
            "recipe_sha256": digest if recipe else None,
            "synthetic": bool(contents and contents.source.get("synthetic")),
            "model_bytes": self.directory.weights_bytes,
            "kl_mean": checks.get("kl_mean") if isinstance(checks, dict) else None,
        }


def read_models(paths: Sequence[str | Path], draft_model: str | None = None) -> list[Model]:
    """The models to compare, checked before anything is measured.

    Raises:
        SourceError: A directory is missing, damaged or holds no text-generation model.
        ConfigError: The same directory is given twice, or the draft model has another vocabulary.
    """
    directories = [_open(path) for path in paths]
    by_key: dict[str, ModelDirectory] = {}
    for directory in directories:
        first = by_key.setdefault(directory.key, directory)
        if first is not directory:
            raise ConfigError(f"{directory.path} and {first.path} are the same model; give it once", code="model-twice")
    models = [Model(directory, _unique_name(directory, directories)) for directory in directories]
    if draft_model is not None:
        draft = _open(draft_model).geometry.vocab
        for model in models:
            vocab = model.directory.geometry.vocab
            if vocab != draft:
                raise ConfigError(
                    f"the draft model {draft_model} has {draft} tokens, {model.name} has {vocab}; use one tokenizer",
                    code="draft-vocabulary",
                )
    return models


def _unique_name(directory: ModelDirectory, directories: Sequence[ModelDirectory]) -> str:
    if sum(each.name == directory.name for each in directories) > 1:
        return f"{directory.path.resolve().parent.name}/{directory.name}"
    return directory.name


def _open(path: str | Path) -> ModelDirectory:
    directory = ModelDirectory.open(path)
    architecture = directory.geometry.architecture
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise SourceError(
            f"{path} holds {architecture}, not a text-generation model; export one: ov-afm export --help",
            code="not-a-language-model",
        )
    return directory


@dataclass(frozen=True, slots=True)
class Combination:
    """One row of the comparison.

    Attributes:
        model: Name of the model.
        device: As requested: `CPU`, `GPU.1`, `NPU-EMULATED`, ...
        option: Key of `OPTIONS`.
        prompt_tokens: Length of each prompt.
        new_tokens: Tokens generated after it.
        concurrency: Requests at a time.
    """

    model: str
    device: str
    option: str
    prompt_tokens: int
    new_tokens: int
    concurrency: int

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Combination:
        """The combination that a record belongs to."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    @property
    def label(self) -> str:
        """For people, in a progress bar."""
        extra = "" if self.option == "plain" else f" {self.option}"
        batch = "" if self.concurrency == 1 else f" ×{self.concurrency}"
        return f"{self.model} {self.device} {self.prompt_tokens}{extra}{batch}"


def combinations(models: Sequence[Model], settings: Settings) -> list[Combination]:
    """Every row of the comparison, in the order in which it runs.

    Options are compared at one request a time, batches with the plain engine.
    """
    names = settings.devices or tuple(each.name for each in devices.available())
    options = tuple(dict.fromkeys(("plain", *settings.options)))
    modes = [(option, 1) for option in options if 1 in settings.concurrency or option != "plain"]
    modes += [("plain", count) for count in settings.concurrency if count > 1]
    return [
        Combination(model.name, device.upper(), option, length, settings.new_tokens, count)
        for model in models
        for device in dict.fromkeys(names)
        for option, count in dict.fromkeys(modes)
        for length in dict.fromkeys(settings.prompt_tokens)
    ]


def use_of(combination: Combination, settings: Settings) -> Use:
    """What the model is loaded for."""
    fields: dict[str, Any] = dict(OPTIONS[combination.option].use)
    fields |= {"prompt_tokens": combination.prompt_tokens, "new_tokens": combination.new_tokens}
    if kind_of(combination.device) == "CPU":
        fields["threads"] = settings.threads
    return Use(**fields)


def obstacle(combination: Combination, model: Model, settings: Settings) -> str | None:
    """Why a combination cannot run; None if it can be tried."""
    total = combination.prompt_tokens + combination.new_tokens
    context = model.directory.context_length
    if total > context:
        return (
            f"a prompt of {combination.prompt_tokens} tokens and {combination.new_tokens} new ones need {total} "
            f"positions; {model.name} has a context of {context}"
        )
    if combination.device == "AUTO":
        return "AUTO is a choice, not a device; name devices, or none for all that are here"
    try:
        devices.choose(combination.device, model.directory.recipe)
    except DeviceError as error:
        return str(error)
    if combination.option == "no-kernels" and not model.directory.packed.is_dir():
        return f"{model.name} has no kernels to do without: it runs the plain model anyway"
    if kind_of(combination.device) == "NPU":
        return _npu_obstacle(combination, settings)
    return None


def _npu_obstacle(combination: Combination, settings: Settings) -> str | None:
    if combination.concurrency > 1:
        return "the NPU takes one request at a time: it has no continuous batching"
    if not OPTIONS[combination.option].on_npu:
        return f"the NPU does not have {combination.option}"
    limit = settings.properties.get("MAX_PROMPT_LEN")
    if limit is not None and combination.prompt_tokens > limit:
        return f"the prompt has {combination.prompt_tokens} tokens, MAX_PROMPT_LEN allows {limit}"
    return None
