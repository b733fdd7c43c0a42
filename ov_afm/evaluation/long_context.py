"""Does a model still read at the end of its context? Two measurements on CPU, through OpenVINO itself.

Needle: a five-digit number appears once in a long invented ledger, at some depth; at the end, the sentence that holds
it begins again. Found means that every token of the number is then ranked first. Perplexity by position: one long
passage, scored from an empty cache. The passage itself varies, so compare a column with that of another model; a
broken rope scaling shows as a jump by orders of magnitude.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..model_dir.model_directory import ModelDirectory
from ..system import console, resources
from .cache import Journal, identity, key_of
from .logits import IrModel, log_probs
from .text import Encoder, Text

__all__ = ["LongContext", "Needle", "long_context", "markdown"]

DEPTHS = (0.1, 0.5, 0.9)
SHORTEST = 256
# Memory that the plugin needs besides cache and weights while it computes a chunk.
BASE_BYTES = 1e9
GOODS = ("rope", "tar", "salt", "oats", "glass", "copper", "wool", "paper", "barley", "slate", "cider", "candles")
TOWNS = ("Torvik", "Hallberg", "Skarholm", "Lunde", "Vestby", "Orkdal", "Mosvik", "Fagernes", "Sandnes", "Ulvik")
WORDS = ("received from", "sent to", "promised to", "returned by", "counted in", "stored at")


@dataclass(frozen=True, slots=True)
class Needle:
    """One search.

    Attributes:
        tokens: Length of the prompt.
        depth: Where the number stands, 0 at the beginning to 1 at the end.
        found: Every token of the number was ranked first.
        log_p: Log-probability of the number, nats.
    """

    tokens: int
    depth: float
    found: bool
    log_p: float


@dataclass(frozen=True, slots=True)
class LongContext:
    """How well a model uses its context.

    Attributes:
        model: Name of its folder.
        context: Tokens that its configuration allows.
        tried: Length of the longest prompt.
        needles: Every search.
        perplexity: First position of a bucket, the position after its last, and the perplexity in between.
        text: Name of the text for perplexity.
        runtime: Precisions it ran at.
    """

    model: str
    context: int
    tried: int
    needles: tuple[Needle, ...]
    perplexity: tuple[tuple[int, int, float], ...]
    text: str
    runtime: dict[str, str]


def long_context(
    model_dir: str | Path,
    text: Text,
    progress: console.Progress,
    max_tokens: int | None = None,
    *,
    runtime_defaults: bool = False,
) -> LongContext:
    """Measure a model along its context, on CPU.

    Args:
        model_dir: The model directory.
        text: For perplexity by position; used as far as it goes.
        progress: Where to draw progress.
        max_tokens: Longest prompt; the model's context if None. Time grows faster than it.
        runtime_defaults: See `logits.IrModel`.

    Raises:
        ConfigError: `max_tokens` is outside what the model allows.
        OVAFMError: The cache of a prompt of that length does not fit in memory, or the model cannot be loaded.
    """
    directory = ModelDirectory.open(model_dir)
    context = directory.context_length
    longest = context if max_tokens is None else max_tokens
    if not SHORTEST <= longest <= context:
        raise ConfigError(
            f"the longest prompt must lie between {SHORTEST} and the model's context of {context}, found {longest}",
            code="long-tokens",
        )
    cache_bytes = 4.0 * directory.geometry.kv_values_per_token * longest
    # The cache is copied when it grows.
    need = 2 * cache_bytes + 2 * directory.weights_bytes + BASE_BYTES
    resources.check_memory(need, f"a prompt of {longest} tokens at f32")
    key = key_of(model=identity(directory.path, progress), text=text.sha256, runtime=runtime_defaults)
    journal = Journal("long", key)
    cells = [(length, depth) for length in _lengths(longest) for depth in DEPTHS]
    encoder = Encoder(directory.path)

    @functools.cache
    def loaded() -> IrModel:
        """Loaded when a figure is missing; the journal keeps its precisions."""
        model = IrModel(directory.path, runtime_defaults=runtime_defaults)
        journal.add("runtime", model.runtime)
        return model

    if "runtime" not in journal.entries:
        loaded()
    with progress.step(f"needles in {directory.name}", total=sum(length for length, _ in cells)) as advance:
        needles = []
        for length, depth in cells:
            id = f"needle {length} {depth}"
            if id not in journal.entries:
                journal.add(id, asdict(_search(loaded(), encoder, length, depth)))
            needles.append(Needle(**journal.entries[id]))
            advance(length)
    tokens = np.array([*encoder.start, *encoder(text.content)][:longest], dtype=np.int64)
    with progress.step(f"reading {text.name}", total=len(tokens) - 1) as advance:
        id = f"nll {len(tokens)}"
        if id not in journal.entries:
            journal.add(id, _bucket_sums(loaded(), tokens, advance))
        buckets = tuple((first, first + count, math.exp(nll / count)) for first, count, nll in journal.entries[id])
    return LongContext(directory.name, context, longest, tuple(needles), buckets, text.name, journal.entries["runtime"])


def _lengths(longest: int) -> list[int]:
    """Doubling from the shortest, and the longest itself."""
    steps = [SHORTEST * 2**power for power in range(int(math.log2(longest / SHORTEST)) + 1)]
    return steps if steps[-1] == longest else [*steps, longest]


def _ledger(encoder: Encoder, seed: random.Random, tokens: int) -> Iterator[list[int]]:
    """Token ids of invented lines, at least so many."""
    count = 0
    while count < tokens:
        number, goods, word = seed.randrange(2, 900), seed.choice(GOODS), seed.choice(WORDS)
        line = encoder(f"{number} loads of {goods} were {word} {seed.choice(TOWNS)}.\n")
        count += len(line)
        yield line


def _search(model: IrModel, encoder: Encoder, length: int, depth: float) -> Needle:
    seed = random.Random(f"{length} {depth}")
    number = str(seed.randrange(10_000, 100_000))
    question = "The secret number of the lighthouse is"
    statement, repeated = encoder(f"{question} {number}.\n"), encoder(question)
    answer = encoder(f"{question} {number}")[len(repeated) :]
    room = length - len(encoder.start) - len(statement) - len(repeated) - len(answer)
    lines = list(_ledger(encoder, seed, room))
    at = max(1, int(depth * len(lines)))
    before, after = (list(itertools.chain(*part)) for part in (lines[:at], lines[at:]))
    # The first line may begin in its middle, so that the length is exact and the last one is whole.
    surplus = len(before) + len(after) - room
    ids = [*encoder.start, *before[surplus:], *statement, *after, *repeated, *answer]
    chunks = log_probs(model, np.array(ids, dtype=np.int64), len(ids) - len(answer))
    log_p = np.concatenate([rows for rows, _ in chunks])
    found = bool((log_p.argmax(-1) == np.array(answer)).all())
    return Needle(len(ids), depth, found, float(log_p[np.arange(len(answer)), answer].sum()))


def _bucket_sums(
    model: IrModel, ids: NDArray[np.int64], advance: Callable[[int], None]
) -> list[tuple[int, int, float]]:
    """First position, number of tokens and sum of the negative log-likelihood of each bucket."""
    nll: list[float] = []
    for log_p, following in log_probs(model, ids):
        nll += (-log_p[np.arange(len(log_p)), following]).tolist()
        advance(len(log_p))
    sums: dict[int, list[float]] = {}
    for position, value in enumerate(nll):
        sums.setdefault(_bucket(position), []).append(value)
    return [(first, len(values), sum(values)) for first, values in sums.items()]


def _bucket(position: int) -> int:
    """First position of the bucket: 0, then powers of two from 128."""
    return 0 if position < SHORTEST // 2 else 2 ** (position.bit_length() - 1)


def markdown(result: LongContext) -> str:
    """Needles as a table of lengths and depths, and perplexity by position."""
    rows = []
    for length in sorted({each.tokens for each in result.needles}):
        by_depth = {each.depth: each for each in result.needles if each.tokens == length}
        needles = [by_depth[depth] for depth in DEPTHS]
        rows.append(
            [str(length), *(f"{'found' if each.found else 'not found'} ({each.log_p:.1f})" for each in needles)]
        )
    headers = [f"{result.model}: prompt tokens", *(f"number at {depth:.0%}" for depth in DEPTHS)]
    buckets = [[f"{first}–{end - 1}", f"{value:.2f}"] for first, end, value in result.perplexity]
    perplexity = console.markdown_table([f"position in {result.text}", "perplexity"], buckets, "lr")
    return f"{console.markdown_table(headers, rows, 'rl')}\n\n{perplexity}"
