"""Does a model still read at the end of its context? Two measurements on CPU, through OpenVINO itself.

Needle: a five-digit number is told once in a long invented ledger, at some depth; at the end the sentence that told
it is begun again. Found means that every token of the number is then ranked first. Perplexity by position: one long
passage, scored from an empty cache. The passage itself varies along its way, so a column means something beside that
of another model, not alone; a broken rope scaling shows as a jump by orders of magnitude.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..model_dir import bundle, manifest
from ..runtime.loading import locate
from ..system import console, resources
from .cache import Journal, identity, key_of
from .divergence import log_softmax
from .logits import IrModel
from .text import Encoder, Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LongContext", "Needle", "long_context", "markdown"]

DEPTHS = (0.1, 0.5, 0.9)
SHORTEST = 256
# What the plugin holds besides cache and weights while it computes a chunk.
BASE_BYTES = 1e9
GOODS = ("rope", "tar", "salt", "oats", "glass", "copper", "wool", "paper", "barley", "slate", "cider", "candles")
TOWNS = ("Torvik", "Hallberg", "Skarholm", "Lunde", "Vestby", "Orkdal", "Mosvik", "Fagernes", "Sandnes", "Ulvik")
WORDS = ("received from", "sent to", "promised to", "returned by", "counted in", "stored at")


@dataclass(frozen=True, slots=True)
class Needle:
    """One search.

    Attributes:
        tokens: Length of the prompt.
        depth: Where the number was told, 0 at the beginning to 1 at the end.
        found: Every token of the number was ranked first.
        log_p: Log-probability of the number, nats.
    """

    tokens: int
    depth: float
    found: bool
    log_p: float


@dataclass(frozen=True, slots=True)
class LongContext:
    """How a model does along its context.

    Attributes:
        model: Name of its folder.
        context: Tokens that its configuration allows.
        tried: Tokens up to which it was asked.
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

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return asdict(self)


def long_context(
    model_dir: str | Path,
    text: Text,
    progress: console.Progress,
    *,
    max_tokens: int | None = None,
    runtime_defaults: bool = False,
) -> LongContext:
    """Measure a model along its context, on CPU.

    Args:
        model_dir: The model directory.
        text: For perplexity by position; used as far as it goes.
        progress: Where to draw progress.
        max_tokens: Longest prompt; the model's context if None. Time grows faster than it.
        runtime_defaults: See `eval_model.IrModel`.

    Raises:
        ConfigError: `max_tokens` is outside what the model allows.
        OVAFMError: The cache of a prompt of that length does not fit in memory, or the model cannot be loaded.
    """
    folder = locate(model_dir)
    manifest.verify(folder)
    shape = bundle.geometry(folder)
    context = int(shape["max_positions"])
    longest = context if max_tokens is None else max_tokens
    if not SHORTEST <= longest <= context:
        raise ConfigError(
            f"the longest prompt must lie between {SHORTEST} and the model's context of {context}, found {longest}"
        )
    cache_bytes = 2.0 * 4 * shape["layers"] * shape["kv_heads"] * shape["head_dim"] * longest
    weights_bytes = (folder / "openvino_model.bin").stat().st_size
    # The cache is copied when it grows.
    resources.check_memory(2 * cache_bytes + 2 * weights_bytes + BASE_BYTES, f"a prompt of {longest} tokens at f32")
    with progress.step(f"identifying {folder.name}", unit="B") as advance:
        key = key_of(
            model=identity(folder, advance),
            text=text.sha256,
            runtime=runtime_defaults,
            openvino=manifest.installed_versions()["openvino"],
        )
    kept = Journal("long", key)
    cells = [(length, depth) for length in _lengths(longest) for depth in DEPTHS]
    encoder = Encoder(folder)
    lazy = _Lazy(folder, runtime_defaults, kept)
    with progress.step(f"needles in {folder.name}", total=sum(length for length, _ in cells)) as advance:
        needles = []
        for length, depth in cells:
            id = f"needle {length} {depth}"
            if id not in kept.entries:
                kept.add(id, asdict(_search(lazy.model(), encoder, length, depth)))
            needles.append(Needle(**kept.entries[id]))
            advance(length)
    buckets = _perplexity(lazy, encoder, text, longest, progress)
    return LongContext(folder.name, context, longest, tuple(needles), buckets, text.name, kept.entries["runtime"])


class _Lazy:
    """A model that is loaded when a figure is missing; the journal keeps what it ran at."""

    def __init__(self, folder: Path, runtime_defaults: bool, kept: Journal) -> None:
        self.kept = kept
        self._folder, self._runtime_defaults = folder, runtime_defaults
        self._model: IrModel | None = None
        if "runtime" not in kept.entries:
            self.model()

    def model(self) -> IrModel:
        if self._model is None:
            self._model = IrModel(self._folder, runtime_defaults=self._runtime_defaults)
            self.kept.add("runtime", self._model.runtime)
        return self._model


def _lengths(longest: int) -> list[int]:
    """Doubling from the shortest, and the longest itself."""
    steps = [SHORTEST * 2**power for power in range(int(math.log2(longest / SHORTEST)) + 1)]
    return steps if steps[-1] == longest else [*steps, longest]


def _ledger(encoder: Encoder, seed: random.Random, tokens: int) -> Iterator[list[int]]:
    """Token ids of invented lines, until there are at least so many."""
    count = 0
    while count < tokens:
        number, goods, word = seed.randrange(2, 900), seed.choice(GOODS), seed.choice(WORDS)
        line = encoder(f"{number} loads of {goods} were {word} {seed.choice(TOWNS)}.\n")
        count += len(line)
        yield line


def _search(model: IrModel, encoder: Encoder, length: int, depth: float) -> Needle:
    import numpy as np

    seed = random.Random(f"{length} {depth}")
    number = str(seed.randrange(10_000, 100_000))
    question = "The secret number of the lighthouse is"
    told, asked = encoder(f"{question} {number}.\n"), encoder(question)
    answer = encoder(f"{question} {number}")[len(asked) :]
    room = length - len(encoder.start) - len(told) - len(asked) - len(answer)
    lines = list(_ledger(encoder, seed, room))
    at = max(1, int(depth * len(lines)))
    before, after = (list(itertools.chain(*part)) for part in (lines[:at], lines[at:]))
    # The first line may begin in its middle, so that the length is exact and the last one is whole.
    surplus = len(before) + len(after) - room
    ids = [*encoder.start, *before[surplus:], *told, *after, *asked, *answer]
    rows = _last_rows(model, np.array(ids, dtype=np.int64), len(answer) + 1)[:-1]
    log_p = log_softmax(rows)
    return Needle(
        len(ids),
        depth,
        bool((rows.argmax(-1) == np.array(answer)).all()),
        float(log_p[np.arange(len(answer)), answer].sum()),
    )


def _last_rows(model: IrModel, ids: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Logits of the last positions of a prompt."""
    import numpy as np

    rows: list[NDArray[np.float32]] = []
    for logits in model.logits(ids):
        rows = [*rows, logits[-count:].copy()][-2:]
    return np.concatenate(rows)[-count:]


def _perplexity(
    lazy: _Lazy, encoder: Encoder, text: Text, longest: int, progress: console.Progress
) -> tuple[tuple[int, int, float], ...]:
    import numpy as np

    used = np.array([*encoder.start, *encoder(text.content)][:longest], dtype=np.int64)
    id = f"nll {len(used)}"
    with progress.step(f"reading {text.name}", total=len(used)) as advance:
        if id not in lazy.kept.entries:
            sums: dict[int, list[float]] = {}
            position = 0
            for logits in lazy.model().logits(used):
                rows = logits[: len(used) - 1 - position]
                following = used[position + 1 : position + 1 + len(rows)]
                for offset, value in enumerate(-log_softmax(rows)[np.arange(len(rows)), following]):
                    sums.setdefault(_bucket(position + offset), []).append(float(value))
                position += len(logits)
                advance(len(logits))
            # As a list of pairs, because the keys of a JSON object are text.
            lazy.kept.add(id, [[first, len(values), sum(values)] for first, values in sorted(sums.items())])
    return tuple((first, first + count, math.exp(total / count)) for first, count, total in lazy.kept.entries[id])


def _bucket(position: int) -> int:
    """First position of the bucket: 0, then powers of two from 128."""
    return 0 if position < SHORTEST // 2 else 2 ** (position.bit_length() - 1)


def markdown(found: LongContext) -> str:
    """Needles as a table of lengths and depths, and perplexity by position."""
    lengths = sorted({round(each.tokens) for each in found.needles})
    lines = [f"| {found.model}: prompt tokens | " + " | ".join(f"told at {depth:.0%}" for depth in DEPTHS) + " |"]
    lines.append("| ---: |" + " --- |" * len(DEPTHS))
    for length in lengths:
        row = {each.depth: each for each in found.needles if each.tokens == length}
        cells = [f"{'found' if row[depth].found else 'not found'} ({row[depth].log_p:.1f})" for depth in DEPTHS]
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    lines += ["", f"| position in {found.text} | perplexity |", "| --- | ---: |"]
    lines += [f"| {first}–{end - 1} | {value:.2f} |" for first, end, value in found.perplexity]
    return "\n".join(lines)
