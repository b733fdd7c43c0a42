"""From a model directory to an engine on a device that can be trusted with it.

Each device that may serve is tried in turn: does the model fit its memory, does it pass the
self-test (once per model, device and driver, in a child process), does it load. The first that does
is used, and one warning says what went wrong with the others.
"""

from __future__ import annotations

import datetime
import logging
import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DeviceError, OVAFMError, last_line
from ..kernels.select import engine_model, is_forced, plain_model
from ..model_dir.manifest import MODEL_BIN, installed_versions
from ..model_dir.model_directory import ModelDirectory
from ..system import resident
from ..system.child_process import run_in_child
from ..system.interrupt import wait_for
from . import device_cache, devices, kernel_choice, lora, npu_blob, self_test
from . import properties as device_properties
from .drafting import LENGTHS
from .kernel_choice import CHAT, Workload
from .properties import DEFAULT_USE, Use
from .stateful import PromptCache, StatefulEngine

__all__ = [
    "COMPARING",
    "LoadRequest",
    "Loaded",
    "OnPhase",
    "PhaseTimer",
    "load",
    "properties_for",
    "reference_answers",
    "remember_verdict",
    "verdict_key",
]

logger = logging.getLogger(__name__)
# Called when a phase begins, with its name and the seconds it took last time (None: it never ran here).
OnPhase = Callable[[str, "float | None"], None]
# Completes GenAI's SchedulerConfig for a kind of device; returns the tokens that the KV cache holds, None if unbounded.
Scheduler = Callable[[str, Any], "int | None"]
# Tokens that a draft model drafts at a time.
MODEL_DRAFTS = 5
# Properties of GenAI, which OpenVINO does not know.
GENAI_ONLY = ("scheduler_config", "ATTENTION_BACKEND", "prompt_lookup", "draft_model", "adapters")
# The phase of loading that happens once a machine.
COMPARING = "comparing the kernels with OpenVINO's own operations on this CPU"


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What is to be loaded, and how.

    Attributes:
        model: The model directory.
        device: Name of the device, as the user gave it.
        use: What the model is loaded for.
        user_properties: OpenVINO properties of the user, which override ours.
        draft_model: A small model of the same tokenizer that drafts tokens.
        prompt_lookup: Draft tokens from the prompt.
        num_assistant_tokens: Tokens drafted at a time by either. None takes 5 by a draft model; with prompt lookup it
            takes as many as pay (see `drafting`).
        fallback: Continue with the next device of `AUTO` when the named one fails.
        adapters: LoRA adapters, computed beside the model.
        scheduler: Load for many requests at once, with this scheduler; None for one request at a time.
        workload: A typical request; decides between a packed and a plain model where neither is always faster.
        prompt_cache: Load so that computed prompts can be kept; None leaves the KV cache to GenAI.
    """

    model: ModelDirectory
    device: str = "CPU"
    use: Use = DEFAULT_USE
    user_properties: Mapping[str, Any] = field(default_factory=dict)
    draft_model: ModelDirectory | None = None
    prompt_lookup: bool = False
    num_assistant_tokens: int | None = None
    fallback: bool = False
    adapters: tuple[lora.Adapter, ...] = ()
    scheduler: Scheduler | None = None
    workload: Workload = CHAT
    prompt_cache: PromptCache | None = None

    def __post_init__(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: Names the options, or the value found.
        """
        if self.draft_model is not None and self.prompt_lookup:
            raise ConfigError("a draft model and prompt lookup exclude each other; choose one")
        if self.num_assistant_tokens is not None and self.num_assistant_tokens < 1:
            raise ConfigError(f"num_assistant_tokens must be at least 1, found {self.num_assistant_tokens}")
        if self.adapters and self.draft_model is not None:
            raise ConfigError(
                "adapters and a draft model exclude each other; choose one, or merge: ov-afm export --merge-adapter"
            )
        if self.prompt_cache is not None:
            self._check_prompt_cache()

    def _check_prompt_cache(self) -> None:
        """Refuse what GenAI's own engine alone can do."""
        given = {
            "adapters": self.adapters,
            "a draft model": self.draft_model,
            "prompt lookup": self.prompt_lookup,
            "prefix caching switched off": self.use.prefix_caching is False,
            **{name: True for name in self.user_properties if name in GENAI_ONLY},
        }
        if names := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"a prompt cache does not go together with {', '.join(names)}; leave one of them out",
                code="prompt-cache-option",
            )

    @property
    def drafts(self) -> bool:
        """Whether tokens are drafted."""
        return self.prompt_lookup or self.draft_model is not None

    @property
    def draft_tokens(self) -> int:
        """Tokens drafted at a time, at first."""
        return self.num_assistant_tokens or (LENGTHS[0] if self.prompt_lookup else MODEL_DRAFTS)


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine and how it came about.

    Attributes:
        engine: GenAI's `LLMPipeline`, its `ContinuousBatchingPipeline` where there is a scheduler, or our
            `StatefulEngine` where prompts are kept.
        choice: The device in use, and why.
        properties: What it was loaded with.
        folder: Folder of the IR: the model directory, or the one that is packed for the kernels.
        cache_tokens: Tokens that the KV cache holds; None if the scheduler does not bound it.
        locked: Mapping that keeps the packed weights in memory; None where nothing does.
    """

    engine: Any
    choice: devices.Choice
    properties: dict[str, Any]
    folder: Path
    cache_tokens: int | None = None
    locked: mmap.mmap | None = None


class PhaseTimer:
    """Reports and times the phases of loading; the device cache keeps the times for the next load.

    Args:
        model: The model's key.
        on_phase: Called when a phase begins.
    """

    def __init__(self, model: str, on_phase: OnPhase | None = None) -> None:
        self.elapsed_s: dict[str, float] = {}
        self._model, self._on_phase = model, on_phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a phase; its time counts if it succeeds."""
        if self._on_phase:
            self._on_phase(name, device_cache.read("load_s").get(f"{self._model}/{name}"))
        begin = time.perf_counter()
        yield
        self.elapsed_s[name] = round(time.perf_counter() - begin, 2)

    def remember(self) -> None:
        """Write the times to the device cache."""
        for name, seconds in self.elapsed_s.items():
            device_cache.remember("load_s", f"{self._model}/{name}", seconds)


def load(request: LoadRequest, phases: PhaseTimer) -> Loaded:
    """Load a model on the first device that can run it.

    Raises:
        ConfigError: The file of the compiled model belongs to another model or device.
        DeviceError: None of the devices can run it; names each one's reason.
    """
    model = request.model
    speeds = device_cache.speeds(model.key)
    failures: list[str] = []
    for choice in devices.choose(request.device, model.recipe, fallback=request.fallback, speeds=speeds):
        try:
            if request.scheduler and (choice.kind == "NPU" or choice.emulated):
                raise DeviceError("it cannot batch requests")
            if request.prompt_cache and (choice.kind != "CPU" or choice.emulated):
                raise DeviceError("computed prompts can be kept on the CPU only")
            properties = properties_for(request, choice)
            _check_trust(request, choice, properties, phases)
            loaded = _load_on(request, choice, properties, phases)
            if request.use.blob is not None and "EXPORT_BLOB" in properties:
                npu_blob.seal(Path(request.use.blob), _blob_origin(request, choice, properties))
        except (RuntimeError, DeviceError) as error:
            failures.append(f"{choice.label}: {last_line(error)}")
            continue
        if failures:
            logger.warning("using %s, because %s", choice.label, "; ".join(failures))
        return replace(loaded, choice=replace(choice, why="; ".join([choice.why, *failures])))
    raise DeviceError(
        f"{model.path.name} could not be loaded: {'; '.join(failures)}; see: ov-afm devices", code="no-device-works"
    )


def properties_for(request: LoadRequest, choice: devices.Choice) -> dict[str, Any]:
    """What a model is loaded with on a device, the folder of its compiled form included.

    Raises:
        ConfigError: The file of the compiled model belongs to another model or device.
        DeviceError: The model does not fit the device's memory, or the device lacks a feature.
    """
    model, geometry = request.model, request.model.geometry
    info = None if _on_cpu(choice) else devices.find(choice.device)
    need = device_properties.estimate_memory(model.weights_bytes, geometry, choice.device, request.use)
    device_properties.check_memory(need, choice.label, info.memory_bytes if info else None)
    npuw = {}
    if choice.emulated and request.adapters:
        # NPUW loses the adapters' inputs when it cuts the model into layers (2026.4.1; seen in the emulation only).
        npuw["NPUW_ONLINE_PIPELINE"] = "NONE"
    properties = device_properties.build(
        choice.device,
        request.use,
        emulated=choice.emulated,
        # The head at 8 bits, or one layer's cache.
        largest_bytes=max(geometry.vocab * geometry.hidden, need.kv_bytes // geometry.layers),
        max_alloc_bytes=info.max_alloc_bytes if info else None,
        user_properties={**npuw, **request.user_properties},
    )
    if "BLOB_PATH" in properties and not properties.get("EXPORT_BLOB"):
        # A blob holds the code; without the weights beside it NPUW asserts (2026.4).
        properties.setdefault("WEIGHTS_PATH", str(model.bin))
    if request.prompt_lookup:
        if choice.kind == "NPU":
            raise DeviceError("prompt lookup is not available")
        properties["prompt_lookup"] = True
    if request.use.blob is not None:
        npu_blob.check(Path(request.use.blob), _blob_origin(request, choice, properties))
    elif info and "CACHE_DIR" not in properties:
        key = device_cache.state_key(model.key, info.full_name, info.driver, properties | _adapters_of(request))
        properties["CACHE_DIR"] = str(device_cache.compiled_dir(key))
    return properties


def _on_cpu(choice: devices.Choice) -> bool:
    """Whether a device's memory is the machine's own, and the weights are in it."""
    return choice.kind == "CPU" or choice.emulated


def _adapters_of(request: LoadRequest) -> dict[str, Any]:
    """What changes the compiled model and is no property."""
    return {"adapters": [each.describe() for each in request.adapters]} if request.adapters else {}


def _blob_origin(request: LoadRequest, choice: devices.Choice, properties: Mapping[str, Any]) -> dict[str, Any]:
    info = None if choice.emulated else devices.find(choice.device)
    full_name, driver = (info.full_name, info.driver) if info else (choice.label, None)
    return npu_blob.origin(request.model.key, full_name, driver, {**properties, **_adapters_of(request)})


def verdict_key(model: str, device: str) -> str:
    """The device cache's key of a self-test: another driver or runtime is another device."""
    info = devices.find(device)
    full_name, driver = (info.full_name, info.driver) if info else (device, None)
    return f"{model}/{full_name}/{driver}/{installed_versions()['openvino']}"


def remember_verdict(key: str, verdict: self_test.Verdict) -> dict[str, Any]:
    """Write a verdict with today's date to the device cache; returns the entry."""
    entry = {"passed": verdict.passed, "evidence": verdict.evidence, "on": str(datetime.date.today())}
    device_cache.remember("verdicts", key, entry)
    return entry


def _check_trust(request: LoadRequest, choice: devices.Choice, properties: dict[str, Any], phases: PhaseTimer) -> None:
    """Refuse a device that fails, or failed, the self-test; the CPU is the reference, and an emulation runs on it."""
    if choice.kind == "CPU" or choice.emulated:
        return
    model = request.model
    key = verdict_key(model.key, choice.device)
    entry = device_cache.read("verdicts").get(key)
    if entry is None:
        golden = reference_answers(model, phases)
        with phases(f"testing {choice.device} in a child process"):
            verdict = wait_for(lambda: self_test.run(model.path, golden, choice.device, properties))
        entry = remember_verdict(key, verdict)
    if not entry["passed"]:
        raise DeviceError(
            f"self-test of {entry['on']} failed: {entry['evidence']} "
            f"(again: ov-afm devices --test {model.path} --device {choice.device})"
        )


def reference_answers(model: ModelDirectory, phases: PhaseTimer) -> Mapping[str, Any] | None:
    """How the model answers on CPU at f32: as export recorded it, else as this machine's CPU computes it once.

    Returns:
        As `self_test.make_golden` gives it; None if this CPU cannot run the model at f32.
    """
    golden: Mapping[str, Any] | None = model.checks.get("golden") or device_cache.read("golden").get(model.key)
    if golden is not None:
        return golden
    try:
        with phases("recording answers on CPU at f32, to compare with"):
            golden = wait_for(lambda: run_in_child(self_test.make_golden, model.path))
    except OVAFMError as error:
        logger.warning("no answers to compare with could be recorded on this CPU: %s", error)
        return None
    device_cache.remember("golden", model.key, golden)
    return golden


def _load_on(request: LoadRequest, choice: devices.Choice, properties: dict[str, Any], phases: PhaseTimer) -> Loaded:
    files = _files(request, choice, properties, phases)
    cache = properties.get("CACHE_DIR")
    name = f"loading on {choice.label}"
    if cache is not None:
        name += " (compiled before)" if any(Path(cache).glob("*.blob")) else " (compiling)"
    with phases(name):
        return wait_for(lambda: _make_engine(request, choice, properties, *files))


def _files(
    request: LoadRequest, choice: devices.Choice, properties: Mapping[str, Any], phases: PhaseTimer
) -> tuple[Path, dict[str, Any]]:
    """The folder of the IR and the properties that it needs: packed for the kernels where they are faster."""
    model = request.model
    # The kernels take the MLPs' layers out of the graph, where adapters would find them.
    folder, kernels = (plain_model if request.adapters else engine_model)(model.path, choice.device)
    if folder == model.path or is_forced():
        return folder, kernels
    try:
        measured = kernel_choice.measured(model, properties)
        if measured is None:
            with phases(COMPARING):
                measured = wait_for(lambda: kernel_choice.measure(model, properties))
    except (RuntimeError, OVAFMError) as error:
        logger.warning("the ReLU² kernels are used without a comparison with OpenVINO's own: %s", last_line(error))
        return folder, kernels
    workload = request.workload
    if request.drafts:
        workload = replace(
            workload, together=tuple(tokens * (1 + request.draft_tokens) for tokens in workload.together)
        )
    return (folder, kernels) if measured.packed_is_faster(workload) else (model.path, {})


def _make_engine(
    request: LoadRequest, choice: devices.Choice, properties: dict[str, Any], folder: Path, kernels: Mapping[str, Any]
) -> Loaded:
    import openvino_genai

    device = choice.device
    arguments = {**properties, **kernels}
    if request.draft_model is not None:
        arguments["draft_model"] = openvino_genai.draft_model(request.draft_model.path, device)
    if request.adapters:
        arguments["adapters"] = lora.engine_config(request.adapters, request.model)
    cache_tokens = None
    if request.scheduler is not None:
        config = arguments.pop("scheduler_config", None) or openvino_genai.SchedulerConfig()
        cache_tokens = request.scheduler(choice.kind, config)
    locked = _prepare_memory(request, choice, folder, cache_tokens) if _on_cpu(choice) else None
    engine: Any
    if request.prompt_cache is not None:
        model = request.model
        engine = StatefulEngine(folder, model.path, model.key, arguments, request.prompt_cache)
    elif request.scheduler is None:
        engine = openvino_genai.LLMPipeline(folder, device, **arguments)
    else:
        engine = openvino_genai.ContinuousBatchingPipeline(folder, config, device, arguments)
    return Loaded(engine, choice, properties, folder, cache_tokens, locked)


def _prepare_memory(
    request: LoadRequest, choice: devices.Choice, folder: Path, cache_tokens: int | None
) -> mmap.mmap | None:
    """See that the model fits the memory that is free, and begin to read its weights; lock them if asked to."""
    model, weights = request.model, folder / MODEL_BIN
    packed = folder != model.path
    size = model.weights_bytes + (request.draft_model.weights_bytes if request.draft_model else 0)
    need = device_properties.estimate_memory(size, model.geometry, choice.device, request.use)
    if cache_tokens is not None:  # for many requests at once
        kv_bytes = need.kv_bytes * cache_tokens // need.context_tokens
        need = replace(need, kv_bytes=kv_bytes, context_tokens=cache_tokens)
    device_properties.check_free_memory(need, f"{model.name} on {choice.label}", packed=packed)
    if not request.use.lock_memory:
        resident.read_ahead(weights)
        return None
    resident.check_lock(weights.stat().st_size)
    return resident.lock_file(weights) if packed else None
