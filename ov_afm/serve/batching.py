"""Many requests at once: openvino-genai's continuous batching, driven step by step from one thread.

Prompts are handed over in order, and in pieces that one step computes whole. GenAI (2026.4) would take them all at
once, and then two things go wrong (`scheduler.hpp`, `pipeline_impl.cpp`, `block_manager.hpp`):

- When a step can schedule nothing, all requests end. A prompt takes the blocks that the prefix cache has of it when it
  is added, and the rest later from what is free, never from others. Two cached prompts that are larger than the cache
  together wait for each other so, and both end. So a prompt is added only when there is room for all of it, and only
  one is under way at a time. Where it happens all the same, the requests are added again and go on where they were.
- A block of the cache gets the name of all its tokens when the first is computed. A request that is cancelled in the
  middle of a block leaves a block in the prefix cache that is not what its name says, and the next request with that
  prompt reads it. Pieces end where blocks end, and none is cancelled while it is computed.

No tokens are drafted here. GenAI drafts for all requests of an engine or for none, and at least one token in
each step: four requests with three drafted tokens each are a step of 16 tokens, which takes twice the time of one of
four (Xeon with AMX, AFM-4.5B's layers). Only answers that quote their prompt give so many tokens back.
"""

from __future__ import annotations

import bisect
import itertools
import time
from dataclasses import dataclass, field, replace
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
from .cache_room import CacheRoom
from .messages import EngineSpec, Piece, TokenLogprob

__all__ = ["BatchingEngine", "Job", "load_request"]

# Tokens in a block of the KV cache, by device: openvino-genai `CacheManager`.
BLOCK_TOKENS = {"CPU": 32, "GPU": 16}
# Steps in a row that schedule nothing before the requests are added again.
STALLED_STEPS = 2000
# How often a request is added again without a new token before it is given up.
MAX_TRIES = 3
# Steps after which a cancelled prompt is not waited for any more.
PATIENCE_STEPS = 64
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
    """

    id: int
    tokens: list[int]
    config: Any
    text: TextAssembler
    logprobs: bool = False

    @property
    def inputs(self) -> Any:
        """The prompt as a tensor."""
        return _tensor(self.tokens)


@dataclass(slots=True)
class _Run:
    """A job under way.

    Attributes:
        job: The job.
        prompt: What is computed before the next token: the prompt, and what was generated before an interruption.
        blocks: Names of the blocks that the prompt fills.
        bounds: Fewest and most tokens of the whole answer.
        generated: Tokens of the answer so far.
        repeated: How many of them GenAI has generated in its present request.
        handle: GenAI's handle of the present request: a piece of the prompt, or the answer.
        piece_end: Tokens of the prompt that the present piece includes.
        begun: The present request has given a token.
        admitted: Its blocks are counted.
        tries: How often it was added again since the last new token.
        patience: Steps that a cancelled run may still take; None if it is not cancelled.
    """

    job: Job
    prompt: list[int]
    blocks: list[int]
    bounds: tuple[int, int]
    generated: list[int] = field(default_factory=list)
    repeated: int = 0
    handle: Any = None
    piece_end: int = 0
    begun: bool = False
    admitted: bool = False
    tries: int = 0
    patience: int | None = None

    @property
    def id(self) -> int:
        """The job's."""
        return self.job.id


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
        prompt_cache=spec.prompt_cache,
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
        sizes = []

        def schedule(kind: str, scheduler: Any) -> int:
            block_tokens = BLOCK_TOKENS[kind]
            piece_tokens = max(spec.prefill_tokens // block_tokens, 1) * block_tokens
            scheduler.max_num_batched_tokens = piece_tokens + spec.max_running
            scheduler.max_num_seqs = spec.max_running
            scheduler.dynamic_split_fuse = True
            # What a step computes depends in its last bits on how many tokens it has, and a cached prompt changes that.
            scheduler.enable_prefix_caching = not spec.deterministic
            cache_tokens = _bound_cache(scheduler, spec, request.model, kind)
            if spec.deterministic:
                piece_tokens = cache_tokens  # GenAI itself cuts prompts into pieces that it need not find again.
            sizes.append((piece_tokens, CacheRoom(cache_tokens // block_tokens, block_tokens)))
            return cache_tokens

        self.session = ModelSession(replace(request, scheduler=schedule))
        self._piece_tokens, self._room = sizes[-1]
        self._max_running, self._deterministic = spec.max_running, spec.deterministic
        self._engine = self.session.engine
        self._numbers = itertools.count(1)
        self._piece_config = self.session.greedy_config(1)
        # In the order in which they came; the one whose prompt is being computed; those that generate.
        self._waiting: list[_Run] = []
        self._prompting: _Run | None = None
        self._running: dict[int, _Run] = {}
        self._idle_steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        own = self._waiting or self._running or self._prompting
        return bool(own) or bool(self._engine.has_non_finished_requests())

    def add(self, job: Job) -> None:
        """Put a request at the end of the queue."""
        bounds = job.config.min_new_tokens, job.config.max_new_tokens
        self._waiting.append(_Run(job, job.tokens, self._room.names(job.tokens), bounds))

    def cancel(self, job_id: int) -> None:
        """End a request; the next steps free its part of the cache."""
        self._waiting = [run for run in self._waiting if run.id != job_id]
        for run in self._in_engine():
            if run.id == job_id:
                run.patience = PATIENCE_STEPS
                if run.begun or run.handle is None or self._deterministic:
                    self._drop(run)

    def step(self) -> list[Piece]:
        """Generate one token for every running request; returns what was added to their answers."""
        self._hand_over()
        self._engine.step()
        pieces = [piece for run in self._in_engine() if (piece := self._read(run))]
        if pieces or self._engine.get_metrics().scheduled_requests:
            self._idle_steps = 0
            return pieces
        self._idle_steps += 1
        if self._idle_steps <= STALLED_STEPS:
            time.sleep(0.001)
            return []
        self._idle_steps = 0
        return [piece for run in self._in_engine() if (piece := self._again(run))]

    def cache_usage(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
        return float(self._engine.get_metrics().cache_usage) / 100

    def _in_engine(self) -> list[_Run]:
        return [*self._running.values(), *([self._prompting] if self._prompting else [])]

    def _hand_over(self) -> None:
        """Give GenAI what the next step can compute of the prompts."""
        left = self._piece_tokens
        while len(self._running) < self._max_running:
            run = self._prompting or (self._waiting[0] if self._waiting else None)
            if run is None or run.handle is not None or not (run.admitted or self._fits(run)):
                return
            begin = min(self._room.cached_tokens(run.blocks), len(run.prompt) - 1)
            end = min((begin // self._piece_tokens + 1) * self._piece_tokens, len(run.prompt))
            if end - begin > left:
                return
            left -= end - begin
            if run is not self._prompting:
                self._prompting = self._waiting.pop(0)
                self._room.take(run.id, run.blocks)
                run.admitted = True
            run.piece_end = end
            if end < len(run.prompt):
                run.handle = self._request(run.prompt[:end], self._piece_config)
                return
            self._prompting, self._running[run.id] = None, run
            config, done = run.job.config, len(run.prompt) - len(run.job.tokens)
            config.min_new_tokens, config.max_new_tokens = (max(bound - done, 0) for bound in run.bounds)
            run.handle = self._request(run.prompt, config)

    def _fits(self, run: _Run) -> bool:
        """Whether there is room for a prompt, its first token, and one more block for everyone who generates."""
        others, room = self._in_engine(), self._room
        if not others or run.tries > 1:
            # What was put back twice gets the engine to itself: the counts must have been wrong.
            return not others
        # The blocks of prompts are counted; what they do not fill, and answers, are not.
        beyond = sum(room.count(len(each.job.tokens) + len(each.generated) + 1) - len(each.blocks) for each in others)
        own = room.missing(run.blocks) + room.count(len(run.prompt) + 1) - len(run.blocks)
        return room.used + beyond + len(others) + own <= room.blocks

    def _request(self, tokens: list[int], config: Any) -> Any:
        return self._engine.add_request(next(self._numbers), _tensor(tokens), config)

    def _drop(self, run: _Run) -> None:
        """Forget a run; the next step frees its part of the cache."""
        if run.handle is not None:
            run.handle.cancel()
            run.handle = None
        self._running.pop(run.id, None)
        if self._prompting is run:
            self._prompting = None
        self._room.give_back(run.id)
        run.admitted = run.begun = False

    def _read(self, run: _Run) -> Piece | None:
        """What the last step added to an answer; None if nothing."""
        piece = self._read_piece(run) if run is self._prompting else self._read_answer(run)
        if run.patience is None or run.handle is None:
            return piece
        run.patience -= 1
        if run.begun or run.patience <= 0:
            self._drop(run)
        return None

    def _read_piece(self, run: _Run) -> Piece | None:
        """See whether a piece of a prompt is computed."""
        if run.handle.can_read():
            run.handle.read()
            run.handle = None
            self._room.remember(run.blocks[: run.piece_end // self._room.block_tokens])
            if run.patience is not None:
                self._drop(run)
        elif run.handle.get_status().name == "IGNORED":
            return self._again(run)
        return None

    def _read_answer(self, run: _Run) -> Piece | None:
        job, text, tokens, logprobs, end = run.job, "", 0, [], None
        while end is None and run.handle.can_read():
            for output in run.handle.read().values():
                for token, logprob in zip(output.generated_ids, output.generated_log_probs, strict=True):
                    self._begin(run)
                    if run.repeated < len(run.generated):
                        if token != run.generated[run.repeated]:
                            return self._again(run, differs=True)
                        run.repeated += 1
                        continue
                    run.generated.append(token)
                    run.repeated, run.tries = len(run.generated), 0
                    tokens += 1
                    text += job.text.push(token)
                    if job.logprobs and token not in job.config.stop_token_ids:
                        logprobs.append(self._logprob(token, logprob))
                    if job.text.stopped:
                        break
                end = _end(job, output.finish_reason.name)
        if end is None and run.handle.get_status().name == "IGNORED":
            again = self._again(run)
            end = again.end if again else None
        if end is not None:
            text += job.text.finish()
            # The rest of the text may hold a stop string too.
            end = "stop" if job.text.stopped else end
            # The last token was not an input.
            self._room.remember(self._room.names([*job.tokens, *run.generated[:-1]], run.blocks))
            self._drop(run)
        return Piece(job.id, text, tokens, logprobs, end, job.text.stop) if tokens or end else None

    def _begin(self, run: _Run) -> None:
        """The first token of GenAI's present request has come: its prompt is computed."""
        if not run.begun:
            run.begun = True
            self._room.share(run.id)
            self._room.remember(run.blocks)

    def _again(self, run: _Run, *, differs: bool = False) -> Piece | None:
        """Put a run that GenAI has ended back into the queue; its last piece if that was in vain.

        Args:
            run: The run.
            differs: It was added again, and does not generate what it had generated before.
        """
        self._drop(run)
        if run.patience is not None:
            return None
        run.tries += 1
        job = run.job
        if run.tries > MAX_TRIES or (differs and job.config.structured_output_config is not None):
            return Piece(job.id, "", 0, end="cache")
        if differs or _can_continue(job.config):
            run.prompt, run.repeated = [*job.tokens, *run.generated], len(run.generated)
            if differs:
                # Not the numbers that chose the first tokens once more.
                job.config.rng_seed += len(run.generated)
        else:
            run.prompt, run.repeated = job.tokens, 0
        run.blocks = self._room.names(run.prompt)
        bisect.insort(self._waiting, run, key=lambda each: each.id)
        return None

    def _logprob(self, token: int, logprob: float) -> TokenLogprob:
        piece = self.session.detokenizer.pieces.get(token, b"")
        return TokenLogprob(piece.decode("utf-8", "replace"), float(logprob), list(piece))


def _tensor(tokens: list[int]) -> Any:
    import numpy as np
    import openvino

    return openvino.Tensor(np.array([tokens], dtype=np.int64))


def _can_continue(config: Any) -> bool:
    """Whether the rest of an answer is the same when its beginning becomes prompt.

    A grammar and two penalties look at the answer alone, and random numbers begin anew.
    """
    penalties = config.presence_penalty or config.frequency_penalty
    return not (config.do_sample or penalties or config.structured_output_config is not None)


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
