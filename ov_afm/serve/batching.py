"""Many requests at once: openvino-genai's continuous batching, driven step by step from one thread."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..kernels.select import engine_model, plain_model
from ..model_dir import manifest
from ..model_dir.geometry import Geometry
from ..runtime import device_cache, devices, loading, lora
from ..runtime.detokenize import Detokenizer, TextAssembler
from ..runtime.properties import KV_BYTES, Use
from ..system.resources import free_memory

__all__ = ["Batch", "EngineSpec", "Job"]

Event = dict[str, Any]
# Tokens in a block of the KV cache, by device: openvino-genai `CacheManager`.
BLOCK_TOKENS = {"CPU": 32, "GPU": 16}
# Steps in a row that schedule nothing before the requests that wait are given up.
STALLED_STEPS = 2000
# Of what is free after loading; the rest is for activations and for the system.
CACHE_SHARE = 0.3
CACHE_GB_MOST = 8.0


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine process is started with.

    Attributes:
        model_dir: The model directory.
        device: As asked for.
        cache_size_gb: Bound of the KV cache; None takes a share of the free memory.
        max_running: Most sequences that are generated at once.
        prefill_tokens: Most tokens in one step: a long prompt is computed in pieces of this size, and
            a cancelled one ends with its piece.
        kv_cache: Precision of the KV cache.
        threads: CPU threads.
        ov_config: OpenVINO properties as they are.
        adapter: File and weight of a LoRA adapter; None serves the model as it is.
    """

    model_dir: str
    device: str = "CPU"
    cache_size_gb: float | None = None
    max_running: int = 32
    prefill_tokens: int = 256
    kv_cache: str | None = None
    threads: int | None = None
    ov_config: dict[str, Any] = field(default_factory=dict)
    adapter: tuple[str, float] | None = None


@dataclass(slots=True)
class Job:
    """A request that is ready for the engine.

    Attributes:
        id: The server's number for it.
        tokens: The prompt.
        config: GenAI's generation configuration.
        text: Turns tokens into text.
        logprobs: Report each token's log probability.
    """

    id: int
    tokens: list[int]
    config: Any
    text: TextAssembler
    logprobs: bool = False
    handle: Any = None
    generated: int = 0


class Batch:
    """A model loaded for continuous batching.

    Args:
        spec: What to load.

    Raises:
        OVAFMError: The model or the device cannot be used.

    Attributes:
        tokenizer: GenAI's tokenizer.
        device: OpenVINO's name of the device.
        context_length: Tokens that prompt and answer may have together.
        max_prompt_tokens: Tokens that a prompt may have.
        cache_tokens: Tokens that the KV cache holds.
        logprobs: Whether log probabilities can be told.
    """

    logprobs = True

    def __init__(self, spec: EngineSpec) -> None:
        import openvino_genai

        model_dir = loading.locate(spec.model_dir)
        contents = manifest.verify(model_dir)
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        geometry = Geometry.from_config(config)
        use = Use(kv_cache=spec.kv_cache, threads=spec.threads)  # type: ignore[arg-type]
        adapter = () if spec.adapter is None else (lora.read(*spec.adapter),)
        request = loading.LoadRequest(
            model_dir, contents, spec.device, use, spec.ov_config, fallback=False, adapters=adapter, batch=True
        )
        phases = loading.Phases(device_cache.model_key(model_dir, contents), None)

        def make(folder: Path, choice: devices.Choice, properties: dict[str, Any]) -> Any:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.max_num_batched_tokens = max(spec.prefill_tokens, spec.max_running)
            scheduler.max_num_seqs = spec.max_running
            scheduler.dynamic_split_fuse = True
            scheduler.enable_prefix_caching = True
            self.cache_tokens = self._bound_cache(scheduler, spec, geometry, choice.kind, model_dir)
            return openvino_genai.ContinuousBatchingPipeline(folder, scheduler, choice.device, properties)

        loaded = loading.load(request, phases, plain_model if adapter else engine_model, make)
        self._engine = loaded.engine
        self.tokenizer = self._engine.get_tokenizer()
        loading.warm_up(request, loaded, phases, self._two_tokens)
        phases.remember()
        self.device = loaded.choice.device
        self.vocab = geometry.vocab
        self.context_length = min(geometry.max_positions, self.cache_tokens)
        self.max_prompt_tokens = self.context_length - 1
        self._jobs: dict[int, Job] = {}
        self._detokenizer = Detokenizer(self.tokenizer)
        self._idle_steps = 0

    def _two_tokens(self) -> None:
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = 2, True
        self._engine.generate([self.tokenizer.encode("warm up", add_special_tokens=False).input_ids], [config])

    def _bound_cache(
        self, scheduler: Any, spec: EngineSpec, geometry: Geometry, kind: str, model_dir: Path
    ) -> int:
        """Set the size of the KV cache; returns the tokens that it holds."""
        size_gb = spec.cache_size_gb
        row_bytes = geometry.kv_values_per_token * KV_BYTES[spec.kv_cache or "u8"]
        if size_gb is None:
            left = free_memory() - (model_dir / "openvino_model.bin").stat().st_size
            wanted = row_bytes * geometry.max_positions * spec.max_running / 1e9
            size_gb = max(min(left / 1e9 * CACHE_SHARE, wanted, CACHE_GB_MOST), 0.05)
        tokens_a_block = BLOCK_TOKENS[kind]
        scheduler.num_kv_blocks = int(size_gb * 1e9 / (row_bytes * tokens_a_block))
        if scheduler.num_kv_blocks < 2:
            raise ConfigError(
                f"a KV cache of {size_gb:g} GB holds no text; {row_bytes * 1024 / 1e9:.2g} GB hold 1024 tokens"
            )
        # One block stays free for the scheduler to copy into.
        return int((scheduler.num_kv_blocks - 1) * tokens_a_block)

    def assembler(self, stop: tuple[str, ...]) -> TextAssembler:
        """A new collector of an answer's text."""
        return self._detokenizer.assembler(stop)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._jobs) or bool(self._engine.has_non_finished_requests())

    def add(self, job: Job) -> None:
        """Put a request into the next step."""
        import numpy as np
        import openvino

        inputs = openvino.Tensor(np.array([job.tokens], dtype=np.int64))
        job.handle = self._engine.add_request(job.id, inputs, job.config)
        self._jobs[job.id] = job

    def cancel(self, job_id: int) -> None:
        """Give a request up; the next step frees its part of the cache."""
        job = self._jobs.pop(job_id, None)
        if job:
            job.handle.cancel()

    def step(self) -> list[Event]:
        """Generate one token for every running request; returns what there is to tell."""
        self._engine.step()
        events: list[Event] = []
        for job in list(self._jobs.values()):
            events += self._read(job)
        self._watch_progress(bool(events), events)
        return events

    def cache_usage(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
        return float(self._engine.get_metrics().cache_usage) / 100

    def _read(self, job: Job) -> list[Event]:
        text, tokens, logprobs, reason = "", 0, [], None
        while reason is None and job.handle.can_read():
            for output in job.handle.read().values():
                for token, logprob in zip(output.generated_ids, output.generated_log_probs, strict=True):
                    tokens += 1
                    text += job.text.push(token)
                    if job.logprobs and token not in job.config.stop_token_ids:
                        logprobs.append(self._logprob(token, logprob))
                    if job.text.stopped:
                        reason = "stop"
                        break
                if reason is None and output.finish_reason.name != "NONE":
                    reason = output.finish_reason.name.lower()
        if reason is None and job.handle.get_status().name == "IGNORED":
            reason = "cache"
        job.generated += tokens
        if reason is not None:
            text += job.text.finish()
            self.cancel(job.id)
        if not (tokens or reason):
            return []
        event: Event = {"id": job.id, "text": text, "tokens": tokens}
        if job.logprobs:
            event["logprobs"] = logprobs
        if reason is not None:
            event["end"] = "stop" if job.text.stopped else reason
        return [event]

    def _logprob(self, token: int, logprob: float) -> Event:
        piece = self._detokenizer.pieces.get(token, b"")
        return {"token": piece.decode("utf-8", "replace"), "logprob": float(logprob), "bytes": list(piece)}

    def _watch_progress(self, progress: bool, events: list[Event]) -> None:
        """Give up requests that the scheduler never takes, instead of turning round for ever."""
        if progress or self._engine.get_metrics().scheduled_requests:
            self._idle_steps = 0
            return
        self._idle_steps += 1
        time.sleep(0.001)
        if self._idle_steps > STALLED_STEPS:
            events += [{"id": job_id, "text": "", "tokens": 0, "end": "cache"} for job_id in self._jobs]
            for job_id in list(self._jobs):
                self.cancel(job_id)
