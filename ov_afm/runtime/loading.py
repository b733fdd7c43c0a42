"""From a model directory to an engine on a device that can be trusted with it.

Each device that may serve is tried in turn: does the model fit its memory, does it pass the
self-test (once per model, device and driver, in a child process), does it load. The first that does
is used, and what went wrong with the others is said once.
"""

from __future__ import annotations

import datetime
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DeviceError, OVAFMError, SourceError, last_line
from ..model_dir import manifest
from ..presets import EMBEDDED_MODEL, Recipe
from ..system import child_process
from ..system.interrupt import wait_for
from . import (
    device_cache,
    devices,
    npu_blob,
    self_test,
)
from . import (
    lora as adapters,
)
from . import (
    properties as device_properties,
)
from .lora import Adapter
from .properties import Use

__all__ = [
    "LoadRequest",
    "Loaded",
    "Phases",
    "load",
    "locate",
    "properties_for",
    "recipe_of",
    "reference_answers",
    "verdict_key",
    "warm_up",
]

logger = logging.getLogger(__name__)
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
OnPhase = Callable[[str, "float | None"], None]
# Folder and extra properties for a model directory and a device.
Variant = Callable[[Path, str], "tuple[Path, dict[str, Any]]"]
# An engine from folder, device and properties.
Make = Callable[[Path, devices.Choice, "dict[str, Any]"], Any]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What is to be loaded, and how.

    Attributes:
        model_dir: The model directory.
        contents: Its manifest.
        device: As asked for.
        use: What the model is loaded for.
        asked: Properties of the caller, which override ours.
        draft_model: Model directory of a drafting model.
        prompt_lookup: Draft from the prompt.
        fallback: Go on to the next device of `AUTO` when the named one fails.
        adapters: LoRA adapters, computed beside the model.
        batch: Requests are to be batched: only devices that can do so.
    """

    model_dir: Path
    contents: manifest.Manifest | None
    device: str
    use: Use
    asked: Mapping[str, Any]
    draft_model: Path | None = None
    prompt_lookup: bool = False
    fallback: bool = True
    adapters: tuple[Adapter, ...] = ()
    batch: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine and how it came about.

    Attributes:
        engine: What `make` of `load` made.
        choice: The device in use, and why.
        properties: What it was loaded with.
        folder: Folder of the model that was loaded: the model directory, or the one for the kernels in it.
    """

    engine: Any
    choice: devices.Choice
    properties: dict[str, Any]
    folder: Path


class Phases:
    """Names the steps of loading while they run, and remembers how long they took here.

    Args:
        model: The model's key in the journal.
        on_phase: Called when a step begins, with its name and the seconds it took last time (None: never ran).
    """

    def __init__(self, model: str, on_phase: OnPhase | None) -> None:
        self.model = model
        self.elapsed_s: dict[str, float] = {}
        self._on_phase = on_phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a step; its time is remembered if it succeeds."""
        key = f"{self.model}/{name}"
        if self._on_phase:
            self._on_phase(name, device_cache.read("load_s").get(key))
        begin = time.perf_counter()
        yield
        self.elapsed_s[name] = round(time.perf_counter() - begin, 2)

    def remember(self) -> None:
        """Write the times to the journal."""
        for name, seconds in self.elapsed_s.items():
            device_cache.remember("load_s", f"{self.model}/{name}", seconds)


def locate(model: str | Path) -> Path:
    """The path of a model directory.

    Raises:
        SourceError: It is a source that must be exported first; says how.
    """
    path = Path(model)
    source = str(model) == EMBEDDED_MODEL or re.fullmatch(HUB_ID, str(model))
    if (source and not path.exists()) or (path.is_file() and path.suffix == ".gguf"):
        raise SourceError(f"{model} is not an OpenVINO model directory; run: ov-afm export {model} --output DIR")
    return path


def recipe_of(contents: manifest.Manifest | None) -> Recipe | None:
    """The recipe of a manifest; None where there is none, or it is none of ours (a prebuilt model may be mixed)."""
    if contents is None or not contents.recipe:
        return None
    try:
        return Recipe.from_dict(contents.recipe)
    except (ConfigError, TypeError) as error:
        logger.info("the recipe of %s is not one of ours: %s", contents.source.get("id"), error)
        return None


def _pipeline(folder: Path, choice: devices.Choice, properties: dict[str, Any]) -> Any:
    import openvino_genai

    return openvino_genai.LLMPipeline(folder, choice.device, **properties)


def load(request: LoadRequest, phases: Phases, variant: Variant, make: Make = _pipeline) -> Loaded:
    """Load a model on the first device that can run it.

    Args:
        request: What is to be loaded.
        phases: Names and times the steps.
        variant: Chooses the plain model or the one that is packed for kernels; `kernels.select` has both. There is no
            default, because a caller that forgets it would measure another model than the one that answers.
        make: Makes the engine; GenAI's `LLMPipeline` if not given.

    Raises:
        ConfigError: The file of the compiled model is of something else.
        DeviceError: No device that was asked for can run it, with each one's reason.
    """
    recipe = recipe_of(request.contents)
    speeds = device_cache.speeds(phases.model)
    failures: list[str] = []
    for choice in devices.choose(request.device, recipe, fallback=request.fallback, speeds=speeds):
        try:
            if request.batch and (choice.kind == "NPU" or choice.emulated):
                raise DeviceError("it cannot batch requests")
            properties = properties_for(request, choice, phases.model)
            _check_trust(request, choice, properties, phases)
            engine, folder = _compile(request, choice, properties, phases, variant, make)
            if request.use.blob is not None and "EXPORT_BLOB" in properties:
                npu_blob.seal(Path(request.use.blob), _blob_origin(request, choice, properties, phases.model))
        except (RuntimeError, DeviceError) as error:
            failures.append(f"{choice.label}: {last_line(error)}")
            continue
        if failures:
            logger.warning("using %s, because %s", choice.label, "; ".join(failures))
        why = "; ".join([choice.why, *failures])
        return Loaded(engine, devices.Choice(choice.device, why, choice.emulated), properties, folder)
    raise DeviceError(f"{request.model_dir.name} could not be loaded: {'; '.join(failures)}; see: ov-afm devices")


def warm_up(
    request: LoadRequest,
    loaded: Loaded,
    phases: Phases,
    two_tokens: Callable[[], Any],
    *,
    room: int | None = None,
) -> None:
    """The first inference, in which the CPU repacks weights for seconds.

    The first time that a model is loaded on this CPU, it answers the short golden prompt in it: other devices are
    tested in a process of their own, the CPU and the kernels where they run.

    Args:
        request: What was loaded.
        loaded: The engine.
        phases: Names and times the step.
        two_tokens: Has the engine generate two tokens; prefill and decode each have a first time.
        room: Tokens that prompt and answer may have together, where that may be less than the recorded prompt needs.

    Raises:
        DeviceError: The answer is wrong.
    """
    golden = _golden_for_cpu(request, loaded)
    if golden and room is not None and golden["prompts"][0]["prompt_tokens"] + self_test.ANSWER_TOKENS > room:
        golden = None
    key = f"{verdict_key(phases.model, 'CPU')}/{loaded.folder.name}/{manifest.installed_versions()['ov_afm']}"
    if golden is None or device_cache.read("verdicts").get(key):
        with phases(f"warming up {loaded.choice.label}"):
            wait_for(two_tokens)
        return
    with phases("warming up CPU and comparing its first answer"):
        verdict = wait_for(lambda: self_test.judge(golden, [self_test.ask(loaded.engine, golden["prompts"][0])]))
    if not verdict.passed:
        way = "" if loaded.folder == request.model_dir else "; without the kernels: OV_AFM_NO_KERNELS=1"
        raise DeviceError(f"{request.model_dir.name} gives wrong answers on this CPU: {verdict.evidence}{way}")
    device_cache.remember("verdicts", key, _entry(verdict))


def _golden_for_cpu(request: LoadRequest, loaded: Loaded) -> Mapping[str, Any] | None:
    """The short recorded answer, if it is what this engine must say."""
    if loaded.choice.kind != "CPU" or request.contents is None:
        return None
    golden = request.contents.checks.get("golden")
    other = request.adapters or request.draft_model or request.prompt_lookup
    approximate = request.contents.sparsity.get("kernels", {}).get("threshold", 0) > 0
    return None if golden is None or other or approximate else {**golden, "prompts": golden["prompts"][:1]}


def _entry(verdict: self_test.Verdict) -> dict[str, Any]:
    return {"passed": verdict.passed, "evidence": verdict.evidence, "on": str(datetime.date.today())}


def properties_for(request: LoadRequest, choice: devices.Choice, model: str) -> dict[str, Any]:
    """What a model is loaded with on a device, the folder of its compiled form included.

    Args:
        request: What is to be loaded.
        choice: The device.
        model: The model's key in the journal.

    Raises:
        ConfigError: The file of the compiled model is of something else.
        DeviceError: The model does not fit the device's memory, or it cannot do what is asked.
    """
    import psutil

    on_cpu = choice.kind == "CPU" or choice.emulated
    info = None if on_cpu else devices.find(choice.device)
    memory = psutil.virtual_memory().total if on_cpu else info.memory_bytes if info else None
    weights = (request.model_dir / "openvino_model.bin").stat().st_size
    geometry = request.contents.geometry if request.contents else None
    largest = None
    if geometry:
        need = device_properties.estimate_memory(weights, geometry, choice.device, request.use)
        device_properties.check_memory(need, choice.label, memory)
        # The head at 8 bits, or one layer's cache.
        largest = max(geometry.vocab * geometry.hidden, need.kv_bytes // geometry.layers)
    found = device_properties.build(
        choice.device,
        request.use,
        emulated=choice.emulated,
        largest_bytes=largest,
        max_alloc_bytes=info.max_alloc_bytes if info else None,
    )
    if choice.emulated and request.adapters:
        # NPUW loses the adapters' inputs when it cuts the model into layers (2026.4.1; seen in the emulation only).
        found["NPUW_ONLINE_PIPELINE"] = "NONE"
    found |= request.asked
    if "BLOB_PATH" in found and not found.get("EXPORT_BLOB"):
        # A blob holds the code; without the weights beside it NPUW asserts (2026.4).
        found.setdefault("WEIGHTS_PATH", str(request.model_dir / "openvino_model.bin"))
    if request.prompt_lookup:
        if choice.kind == "NPU":
            raise DeviceError("prompt lookup is not available there")
        found["prompt_lookup"] = True
    if request.use.blob is not None:
        npu_blob.check(Path(request.use.blob), _blob_origin(request, choice, found, model))
    elif info and "CACHE_DIR" not in found:
        key = device_cache.state_key(model, info.full_name, info.driver, found | _graph(request))
        found["CACHE_DIR"] = str(device_cache.compiled_dir(key))
    return found


def _graph(request: LoadRequest) -> dict[str, Any]:
    """What changes the compiled model and is no property."""
    return {"adapters": [each.describe() for each in request.adapters]} if request.adapters else {}


def _blob_origin(
    request: LoadRequest, choice: devices.Choice, properties: Mapping[str, Any], model: str
) -> dict[str, Any]:
    info = None if choice.emulated else devices.find(choice.device)
    named = (info.full_name, info.driver) if info else (choice.label, None)
    return npu_blob.origin(model, *named, {**properties, **_graph(request)})


def verdict_key(model: str, device: str) -> str:
    """The journal's key of a self-test: another driver or runtime is another device."""
    info = devices.find(device)
    named = (info.full_name, info.driver) if info else (device, None)
    return f"{model}/{named[0]}/{named[1]}/{manifest.installed_versions()['openvino']}"


def _check_trust(request: LoadRequest, choice: devices.Choice, properties: dict[str, Any], phases: Phases) -> None:
    """Refuse a device that fails, or failed, the self-test; the CPU is the reference, and an emulation runs on it."""
    if choice.kind == "CPU" or choice.emulated:
        return
    key = verdict_key(phases.model, choice.device)
    known = device_cache.read("verdicts").get(key)
    if known is None:
        golden = reference_answers(request.model_dir, request.contents, phases)
        with phases(f"testing {choice.device} in a child process"):
            verdict = wait_for(lambda: self_test.run(request.model_dir, golden, choice.device, properties))
        known = _entry(verdict)
        device_cache.remember("verdicts", key, known)
    if not known["passed"]:
        raise DeviceError(
            f"self-test of {known['on']} failed: {known['evidence']} "
            f"(again: ov-afm devices --test {request.model_dir} --device {choice.device})"
        )


def reference_answers(model_dir: Path, contents: manifest.Manifest | None, phases: Phases) -> Mapping[str, Any] | None:
    """How the model answers on CPU at f32: as export recorded it, else as this machine's CPU says once.

    Returns:
        As `selftest.make_golden` gives it; None if this CPU cannot run the model at f32.
    """
    recorded = contents.checks.get("golden") if contents else None
    known: Mapping[str, Any] | None = recorded or device_cache.read("golden").get(phases.model)
    if known is not None:
        return known
    try:
        with phases("recording answers on CPU at f32, to compare with"):
            known = wait_for(lambda: child_process.run_in_child(self_test.make_golden, model_dir))
    except OVAFMError as error:
        logger.warning("this CPU cannot say what the model's answers should be: %s", error)
        return None
    device_cache.remember("golden", phases.model, known)
    return known


def _compile(
    request: LoadRequest,
    choice: devices.Choice,
    properties: dict[str, Any],
    phases: Phases,
    variant: Variant,
    make: Make,
) -> tuple[Any, Path]:
    """The engine, and the folder that it was loaded from."""
    cache = properties.get("CACHE_DIR")
    name = f"loading on {choice.label}"
    if cache is not None:
        name += " (compiled before)" if any(Path(cache).glob("*.blob")) else " (compiling)"

    def made() -> tuple[Any, Path]:
        extra = {}
        if request.draft_model is not None:
            import openvino_genai

            manifest.verify(request.draft_model)
            extra["draft_model"] = openvino_genai.draft_model(request.draft_model, choice.device)
        if request.adapters:
            extra["adapters"] = adapters.engine_config(request.adapters, request.model_dir)
        folder, kernels = variant(request.model_dir, choice.device)
        return make(folder, choice, {**properties, **kernels, **extra}), folder

    with phases(name):
        return wait_for(made)
