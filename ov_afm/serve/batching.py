"""Many requests at once: openvino-genai's continuous batching, driven step by step from one thread.

No tokens are drafted here. GenAI (2026.4) drafts for all requests of an engine or for none, and at least one token in
each step: four requests with three drafted tokens each are a step of 16 tokens, which takes twice the time of one of
four (Xeon with AMX, AFM-4.5B's layers). Only answers that quote their prompt give so many tokens back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..model_dir.model_directory import ModelDirectory
from ..runtime import lora
from ..runtime.detokenize import TextAssembler
from ..runtime.kernel_choice import SERVE
from ..runtime.loading import LoadRequest
from ..runtime.model_session import ModelSession
from ..runtime.properties import KV_BYTES, PLAIN_SHARE, WORKING_BYTES, Use
from ..system.resources import free_memory
from .messages import EngineSpec, Piece, TokenLogprob

__all__ = ["BatchingEngine", "Job", "load_request"]

# Tokens in a block of the KV cache, by device: openvino-genai `CacheManager`.
BLOCK_TOKENS = {"CPU": 32, "GPU": 16}
# Steps in a row that schedule nothing before the waiting requests are given up.
STALLED_STEPS = 2000
# Share of the memory that is free after loading; the rest is for activations and for the system.
CACHE_SHARE = 0.3
MAX_CACHE_GB = 8.0


@dataclass(slots=True)
class Job:
    """A request that is ready for the engine.

    Attributes:
        id: The server's number of it.
        tokens: The prompt.
        config: GenAI's generation configuration.
        text: Collects the answer's text.
        logprobs: Report each token's log probability.
        handle: GenAI's handle of the request, once the engine has it.
    """

    id: int
    tokens: list[int]
    config: Any
    text: TextAssembler
    logprobs: bool = False
    handle: Any = None

    @property
    def inputs(self) -> Any:
        """The prompt as a tensor."""
        import numpy as np
        import openvino

        return openvino.Tensor(np.array([self.tokens], dtype=np.int64))


def load_request(spec: EngineSpec) -> LoadRequest:
    """What an engine's specification loads.

    Raises:
        OVAFMError: The model directory or the adapter cannot be used.
    """
    return LoadRequest(
        ModelDirectory.open(spec.model_dir),
        spec.device,
        Use(kv_cache=spec.kv_cache, threads=spec.threads, lock_memory=spec.lock_memory),  # type: ignore[arg-type]
        spec.ov_config,
        adapters=() if spec.adapter is None else (lora.read(*spec.adapter),),
        workload=SERVE,
    )


class BatchingEngine:
    """A model loaded for continuous batching.

    Args:
        spec: What to load.

    Raises:
        OVAFMError: The model or the device cannot be used.

    Attributes:
        session: The loaded model.
        logprobs: Whether the engine reports log probabilities.
    """

    logprobs = True

    def __init__(self, spec: EngineSpec) -> None:
        request = load_request(spec)

        def schedule(kind: str, scheduler: Any) -> int:
            scheduler.max_num_batched_tokens = max(spec.prefill_tokens, spec.max_running)
            scheduler.max_num_seqs = spec.max_running
            scheduler.dynamic_split_fuse = True
            scheduler.enable_prefix_caching = True
            return _bound_cache(scheduler, spec, request.model, kind)

        self.session = ModelSession(replace(request, scheduler=schedule))
        self._engine = self.session.engine
        self._jobs: dict[int, Job] = {}
        self._idle_steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._jobs) or bool(self._engine.has_non_finished_requests())

    def add(self, job: Job) -> None:
        """Put a request into the next step."""
        job.handle = self._engine.add_request(job.id, job.inputs, job.config)
        self._jobs[job.id] = job

    def cancel(self, job_id: int) -> None:
        """End a request; the next step frees its part of the cache."""
        job = self._jobs.pop(job_id, None)
        if job:
            job.handle.cancel()

    def step(self) -> list[Piece]:
        """Generate one token for every running request; returns what was added to their answers."""
        self._engine.step()
        pieces = [piece for job in list(self._jobs.values()) if (piece := self._read(job))]
        if pieces or self._engine.get_metrics().scheduled_requests:
            self._idle_steps = 0
            return pieces
        return self._give_up_stalled()

    def cache_usage(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
        return float(self._engine.get_metrics().cache_usage) / 100

    def _read(self, job: Job) -> Piece | None:
        """What the last step added to an answer; None if nothing."""
        text, tokens, logprobs, end = "", 0, [], None
        while end is None and job.handle.can_read():
            for output in job.handle.read().values():
                for token, logprob in zip(output.generated_ids, output.generated_log_probs, strict=True):
                    tokens += 1
                    text += job.text.push(token)
                    if job.logprobs and token not in job.config.stop_token_ids:
                        logprobs.append(self._logprob(token, logprob))
                    if job.text.stopped:
                        break
                end = _end(job, output.finish_reason.name)
        if end is None and job.handle.get_status().name == "IGNORED":
            end = "cache"
        if end is not None:
            text += job.text.finish()
            # The rest of the text may hold a stop string too.
            end = "stop" if job.text.stopped else end
            self.cancel(job.id)
        return Piece(job.id, text, tokens, logprobs, end, job.text.stop) if tokens or end else None

    def _logprob(self, token: int, logprob: float) -> TokenLogprob:
        piece = self.session.detokenizer.pieces.get(token, b"")
        return TokenLogprob(piece.decode("utf-8", "replace"), float(logprob), list(piece))

    def _give_up_stalled(self) -> list[Piece]:
        """End all requests once the scheduler has taken none of them for many steps."""
        self._idle_steps += 1
        time.sleep(0.001)
        if self._idle_steps <= STALLED_STEPS:
            return []
        pieces = [Piece(job_id, "", 0, end="cache") for job_id in self._jobs]
        for piece in pieces:
            self.cancel(piece.id)
        return pieces


def _end(job: Job, finish_reason: str) -> str | None:
    """Why an answer ends: a stop string, or GenAI's reason; None if it continues."""
    if job.text.stopped:
        return "stop"
    return None if finish_reason == "NONE" else finish_reason.lower()


def _bound_cache(scheduler: Any, spec: EngineSpec, model: ModelDirectory, kind: str) -> int:
    """Set the size of the KV cache; returns the tokens that it holds."""
    size_gb = spec.cache_size_gb
    token_bytes = model.geometry.kv_values_per_token * KV_BYTES[spec.kv_cache or "u8"]
    if size_gb is None:
        free_gb = (free_memory() - PLAIN_SHARE * model.weights_bytes - WORKING_BYTES) / 1e9
        all_full_gb = token_bytes * model.context_length * spec.max_running / 1e9
        size_gb = max(min(free_gb * CACHE_SHARE, all_full_gb, MAX_CACHE_GB), 0.05)
    block_tokens = BLOCK_TOKENS[kind]
    scheduler.num_kv_blocks = int(size_gb * 1e9 / (token_bytes * block_tokens))
    if scheduler.num_kv_blocks < 2:
        raise ConfigError(
            f"a KV cache of {size_gb:g} GB holds no text; {token_bytes * 1024 / 1e9:.2g} GB hold 1024 tokens",
            code="kv-cache-too-small",
        )
    # One block stays free for the scheduler to copy into.
    return int((scheduler.num_kv_blocks - 1) * block_tokens)
