"""What a model is loaded with, by device and by what it is for, in the types that each plugin takes.

The plugins and GenAI are strict about types (`MAX_PROMPT_LEN` is an int, never "1024") and ignore
names that another device would know, so everything goes through one function that is tested
against the real plugins. GPU and NPU names were read from the plugins of OpenVINO 2026.4; the NPU's
were run by emulation, the GPU's were not run at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, DeviceError
from ..model_dir.geometry import Geometry
from ..model_dir.inference import EXACT
from ..system import control_groups, resources
from .rules import kind_of

__all__ = ["DEFAULT_USE", "MemoryEstimate", "Use", "build", "check_free_memory", "check_memory", "estimate_memory"]

# GenAI's own defaults on NPU, given always so that the limits are known before a prompt is run.
NPU_PROMPT_TOKENS = 1024
NPU_NEW_TOKENS = 128
# Context that memory is estimated for where none is given: a long chat.
DEFAULT_CONTEXT_TOKENS = 4096
# u8 with a scale and a zero point (f32) for each head's row of 128; 2 and 4 bytes without.
KV_BYTES = {"u8": 1 + 8 / 128, "f16": 2.0, "f32": 4.0}
# Of the weights, what the CPU plugin holds once it has repacked them for one token and for many; the kernels repack
# nothing. And what a process needs beside weights and cache. Measured on AFM's geometry with 6 layers, 600 tokens.
PLAIN_SHARE = 1.3
WORKING_BYTES = 300_000_000
# Values of the fields that have a choice of them.
CHOICES = {
    "kv_cache": tuple(KV_BYTES),
    "prefill_hint": ("DYNAMIC", "STATIC"),
    "generate_hint": ("FAST_COMPILE", "BEST_PERF"),
}
HALF = ("f16", "bf16")
NPU_ONLY = ("prefill_hint", "generate_hint", "chunk_tokens", "blob")
# Fields that a kind of device does not take.
CPU_ONLY = ("threads", "lock_memory")
FOREIGN = {"CPU": NPU_ONLY, "GPU": (*NPU_ONLY, *CPU_ONLY), "NPU": (*CPU_ONLY, "kv_cache")}


@dataclass(frozen=True, slots=True)
class Use:
    """What a model is loaded for. None leaves a choice to the plugin.

    Attributes:
        prompt_tokens: Longest prompt; NPU reserves room for it, elsewhere it only counts for memory.
        new_tokens: Longest answer; likewise.
        kv_cache: Precision of the KV cache on CPU and GPU.
        threads: CPU threads.
        lock_memory: Keep the weights in memory, whatever else wants it; CPU on Linux.
        exact: Compute in f32 with an f32 cache: slow, to tell a rounding problem from a wrong model.
        prefix_caching: Keep computed prompts for the next request that begins with the same text.
        prefill_hint: NPU: `DYNAMIC` prefills in chunks, `STATIC` at once.
        generate_hint: NPU: `BEST_PERF` or `FAST_COMPILE`.
        chunk_tokens: NPU: tokens in a prefill chunk, a power of two.
        blob: NPU: file of the compiled model; read if it exists, else written (ends in `.blob`).
    """

    prompt_tokens: int | None = None
    new_tokens: int | None = None
    kv_cache: Literal["u8", "f16", "f32"] | None = None
    threads: int | None = None
    lock_memory: bool = False
    exact: bool = False
    prefix_caching: bool | None = None
    prefill_hint: Literal["DYNAMIC", "STATIC"] | None = None
    generate_hint: Literal["FAST_COMPILE", "BEST_PERF"] | None = None
    chunk_tokens: int | None = None
    blob: str | Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that no plugin takes.

        Raises:
            ConfigError: Names the field and the value found.
        """
        for name in ("prompt_tokens", "new_tokens", "threads", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if self.chunk_tokens is not None and self.chunk_tokens & (self.chunk_tokens - 1):
            raise ConfigError(f"chunk_tokens must be a power of two, found {self.chunk_tokens}")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")
        if self.blob is not None and Path(self.blob).suffix != ".blob":
            raise ConfigError(f"the file of a compiled model must end in .blob, found {Path(self.blob).name}")

    @property
    def context_tokens(self) -> int:
        """Tokens that memory is estimated for."""
        if self.prompt_tokens is None and self.new_tokens is None:
            return DEFAULT_CONTEXT_TOKENS
        return (self.prompt_tokens or 0) + (self.new_tokens or 0)


DEFAULT_USE = Use()


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a loaded model needs at least.

    Attributes:
        weights_bytes: The weights as stored.
        kv_bytes: KV cache of a full context.
        context_tokens: Tokens of that context.
    """

    weights_bytes: int
    kv_bytes: int
    context_tokens: int

    @property
    def total_bytes(self) -> int:
        """Weights and cache; working memory comes on top."""
        return self.weights_bytes + self.kv_bytes


def estimate_memory(weights_bytes: int, geometry: Geometry, device: str, use: Use) -> MemoryEstimate:
    """Memory for weights and KV cache.

    Args:
        weights_bytes: Size of `openvino_model.bin`.
        geometry: The model's shape.
        device: Where it runs; by default the cache is u8 on CPU and GPU, and f16 on NPU.
        use: What the model is loaded for.
    """
    precision = "f32" if use.exact else use.kv_cache or ("f16" if kind_of(device) == "NPU" else "u8")
    tokens = min(use.context_tokens, geometry.max_positions)
    if kind_of(device) == "NPU":
        tokens = (use.prompt_tokens or NPU_PROMPT_TOKENS) + (use.new_tokens or NPU_NEW_TOKENS)
    kv_bytes = int(geometry.kv_values_per_token * KV_BYTES[precision] * tokens)
    return MemoryEstimate(weights_bytes, kv_bytes, tokens)


def check_memory(need: MemoryEstimate, device: str, memory_bytes: int | None) -> None:
    """Refuse a model that cannot fit a device.

    Raises:
        DeviceError: With both figures, and how much of it is context.
    """
    if memory_bytes is None or need.total_bytes <= memory_bytes:
        return
    raise DeviceError(
        f"{device} has {memory_bytes / 1e9:.2f} GB; the model needs {need.weights_bytes / 1e9:.2f} GB and "
        f"{need.kv_bytes / 1e9:.2f} GB more for a context of {need.context_tokens} tokens; "
        "use a smaller recipe (int4), a shorter context or another device"
    )


def check_free_memory(need: MemoryEstimate, what: str, *, packed: bool) -> None:
    """Refuse a model that this machine, or the control group of this process, has no memory for now.

    Args:
        need: Weights and cache.
        what: The model and where it runs, for the message.
        packed: The kernels run it, from the mapped file.

    Raises:
        DeviceError: With code `memory-short`, what is needed, and what is free.
    """
    weights = need.weights_bytes * (1.0 if packed else PLAIN_SHARE)
    resources.check_memory(
        weights + need.kv_bytes + WORKING_BYTES,
        f"{what} ({need.weights_bytes / 1e9:.2f} GB of weights, {need.context_tokens} tokens of context)",
        remedy="use a smaller recipe (int4) or a shorter context, or close other programs",
        error=DeviceError,
    )


def build(
    device: str,
    use: Use = DEFAULT_USE,
    *,
    emulated: bool = False,
    cache_dir: Path | None = None,
    largest_bytes: int | None = None,
    max_alloc_bytes: int | None = None,
    user_properties: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The properties to load a model with.

    Args:
        device: `CPU`, `GPU.0`, `NPU`, ...
        use: What the model is loaded for.
        emulated: Run the NPU's path on CPU.
        cache_dir: Folder for the compiled model; not used on CPU, where it saves nothing.
        largest_bytes: Size of the largest single allocation: a weight or one layer's cache.
        max_alloc_bytes: Largest allocation that the GPU's driver allows by default.
        user_properties: Properties of the user, which override all others.

    Raises:
        ConfigError: The use has a field that this kind of device does not take, or precisions exclude each other.
    """
    kind = kind_of(device)
    given = [name for name in FOREIGN.get(kind, ()) if getattr(use, name) not in (None, False)]
    if given:
        raise ConfigError(f"{device} does not take {', '.join(given)}")
    # The plugin follows the processors that it may use, and knows no quota.
    threads = use.threads or (control_groups.quota_threads() if kind == "CPU" else None)
    properties = _npu(use) if kind == "NPU" else _cpu_or_gpu(use, threads)
    if kind == "GPU" and largest_bytes and max_alloc_bytes and largest_bytes > max_alloc_bytes:
        properties["GPU_ENABLE_LARGE_ALLOCATIONS"] = True
    if emulated:
        # Equal layers are compiled once, as for an NPU; as a whole, AFM-4.5B needs more than 24 GB.
        properties |= {"NPU_USE_NPUW": "YES", "NPUW_DEVICES": "CPU"}
    if cache_dir is not None and kind != "CPU" and use.blob is None:
        properties["CACHE_DIR"] = str(cache_dir)
    properties |= user_properties or {}
    if kind == "CPU" and properties.get("KV_CACHE_PRECISION") == "f32":
        # Where a CPU computes in bf16 by default, paged attention refuses an f32 cache (2026.4).
        found = properties.setdefault("INFERENCE_PRECISION_HINT", "f32")
        if str(found).lower() in HALF:
            raise ConfigError(
                f"a KV cache of f32 needs computing in f32, found INFERENCE_PRECISION_HINT={found}; leave that out, or "
                "use a KV cache of f16 or u8",
                code="kv-cache-precision",
            )
    return properties


def _cpu_or_gpu(use: Use, threads: int | None) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    if threads is not None:
        properties["INFERENCE_NUM_THREADS"] = threads
    if use.exact:
        properties |= EXACT
    if use.kv_cache is not None:
        properties["KV_CACHE_PRECISION"] = use.kv_cache
    if use.prefix_caching is False:
        import openvino_genai

        # On by default in GenAI; the rest is what its latency-oriented default sets.
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2**63 - 1
        scheduler.enable_prefix_caching = False
        properties["scheduler_config"] = scheduler
    return properties


def _npu(use: Use) -> dict[str, Any]:
    values: dict[str, Any] = {
        "MAX_PROMPT_LEN": use.prompt_tokens or NPU_PROMPT_TOKENS,
        "MIN_RESPONSE_LEN": use.new_tokens or NPU_NEW_TOKENS,
        "PREFILL_HINT": use.prefill_hint,
        "GENERATE_HINT": use.generate_hint,
        "NPUW_LLM_PREFILL_CHUNK_SIZE": use.chunk_tokens,
        "NPUW_LLM_ENABLE_PREFIX_CACHING": use.prefix_caching,
        "INFERENCE_PRECISION_HINT": "f32" if use.exact else None,
        "BLOB_PATH": None if use.blob is None else str(use.blob),
        "EXPORT_BLOB": None if use.blob is None or Path(use.blob).exists() else True,
    }
    return {name: value for name, value in values.items() if value is not None}
