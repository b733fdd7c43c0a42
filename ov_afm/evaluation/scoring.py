"""Score a candidate against a reference, block by block, from the cache where it can be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, OVAFMError
from ..kernels.select import engine_model
from ..model_dir import manifest
from ..model_dir.inference import kl_divergence
from ..system import console
from .cache import Expected, Store, identity, key_of
from .divergence import Scores
from .logits import LogitModel, log_probs, opened
from .text import Blocks, Encoder, Text, cut

__all__ = ["OtherTokenizer", "Reference", "prepare_reference", "score", "tokens_of"]


class OtherTokenizer(ConfigError):
    """Two models cut a text into different tokens, so that their distributions cannot be compared."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference whose distributions on some blocks are in the cache.

    Attributes:
        name: Its folder's name.
        key: Digest of the model and of the text.
        store: Its distributions.
        vocab: Width of its logits.
    """

    name: str
    key: str
    store: Store
    vocab: int

    def expected(self, block: int) -> Expected:
        """Its distributions for one block.

        Raises:
            OVAFMError: The block was lost since it was prepared.
        """
        arrays = self.store.read(block)
        if arrays is None:
            raise OVAFMError(
                f"the cached reference in {self.store.folder} was damaged meanwhile; run the command again",
                code="cache-damaged",
            )
        return Expected(**arrays)


def tokens_of(model: Path, text: Text, reference: Path | None = None) -> Blocks:
    """The blocks of a text for a model and its reference.

    Raises:
        OtherTokenizer: Their tokenizers differ on this text.
    """
    encoder = Encoder(model)
    ids = encoder(text.content)
    if reference is not None:
        expected = Encoder(reference)(text.content)
        if ids != expected:
            at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
            raise OtherTokenizer(
                f"the reference {reference.name} has another tokenizer than {model.name}: token {at} of {text.name} is "
                f"{expected[at : at + 1]} there and {ids[at : at + 1]} here; compare models of one tokenizer",
                code="other-tokenizer",
            )
    return cut(text, ids, encoder.start)


def prepare_reference(model: Path, blocks: Blocks, progress: console.Progress) -> Reference:
    """Fill the cache with a reference's distributions at f32, as far as they are missing.

    Raises:
        OVAFMError: It cannot be loaded, does not fit on the disk or in memory, or gives logits that are not finite.
    """
    key = key_of(model=identity(model, progress), blocks=blocks.sha256)
    store = Store("reference", key)
    missing = [block for block in range(len(blocks.ids)) if not store.has(block)]
    if missing:
        with progress.step("running the reference", total=len(blocks.ids)) as advance:
            advance(len(blocks.ids) - len(missing))
            with opened(model) as running:
                store.check_room(2 * running.vocab * blocks.block_tokens, len(blocks.ids))
                for block in missing:
                    store.write(block, _expected(running, blocks, block))
                    advance(1)
    first = store.read(0)
    if first is None:
        return prepare_reference(model, blocks, progress)
    return Reference(model.name, key, store, int(first["codes"].shape[1]))


def _expected(model: LogitModel, blocks: Blocks, block: int) -> Expected:
    import numpy as np

    parts = [Expected.of(*chunk) for chunk in log_probs(model, blocks.ids[block], blocks.first_scored)]
    return Expected(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in Expected.__dataclass_fields__)
    )


def score(
    model: Path,
    blocks: Blocks,
    reference: Reference | None,
    progress: console.Progress,
    *,
    runtime_defaults: bool = False,
) -> tuple[list[Scores], dict[str, str]]:
    """Scores of every block of a candidate, and the precisions it ran at.

    Args:
        model: Model directory or checkpoint folder.
        blocks: The text.
        reference: What to compare with; None for perplexity alone.
        progress: Where to draw progress.
        runtime_defaults: See `logits.IrModel`.

    Raises:
        OVAFMError: It cannot be loaded, its vocabulary is not the reference's, or its logits are not finite.
    """
    key = key_of(
        model=identity(model, progress),
        reference=reference.key if reference else None,
        blocks=blocks.sha256,
        runtime=_runtime(model) if runtime_defaults else "f32",
    )
    store = Store("scores", key)
    runtime_file = store.folder / "runtime.json"
    scores = {block: Scores(**arrays) for block in range(len(blocks.ids)) if (arrays := store.read(block)) is not None}
    with progress.step(f"scoring {model.name}", total=len(blocks.ids)) as advance:
        advance(len(scores))
        if len(scores) < len(blocks.ids) or not runtime_file.exists():
            with opened(model, runtime_defaults=runtime_defaults) as running:
                if reference and reference.vocab != running.vocab:
                    raise ConfigError(
                        f"{model.name} has {running.vocab} logits a token, the reference {reference.name} has "
                        f"{reference.vocab}",
                        code="other-vocabulary",
                    )
                runtime_file.write_text(json.dumps(running.runtime), encoding="utf-8")
                for block in range(len(blocks.ids)):
                    if block not in scores:
                        scores[block] = _scores(running, blocks, block, reference)
                        store.write(block, scores[block])
                        advance(1)
    runtime: dict[str, str] = json.loads(runtime_file.read_text(encoding="utf-8"))
    return [scores[block] for block in range(len(blocks.ids))], runtime


def _runtime(model: Path) -> str | list[str]:
    """What runs at the runtime's defaults: hashes of the packed model and of the native library, if these do."""
    folder, properties = engine_model(model, "CPU")
    if folder == model:
        return "plain"
    return [manifest.sha256(path) for path in (folder / manifest.MODEL_XML, *map(Path, properties["extensions"]))]


def _scores(model: LogitModel, blocks: Blocks, block: int, reference: Reference | None) -> Scores:
    import numpy as np

    expected = reference.expected(block) if reference else None
    nll, kl, same = [], [], []
    first = 0
    for log_p, following in log_probs(model, blocks.ids[block], blocks.first_scored):
        nll.append(-log_p[np.arange(len(log_p)), following])
        if expected:
            last = first + len(log_p)
            kl.append(kl_divergence(expected.log_p(first, last), log_p))
            same.append(log_p.argmax(-1) == expected.top[first:last])
            first = last
    empty = np.empty(0, dtype=np.float32)
    return Scores(
        np.concatenate(nll),
        expected.nll if expected else empty,
        np.concatenate(kl) if kl else empty,
        np.concatenate(same) if same else empty.astype(bool),
    )
