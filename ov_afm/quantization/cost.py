"""What compression costs: how far a compressed model is from its source on a short text, computed at f32."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model_dir.hf_tokenizer import load_hf_tokenizer
from ..model_dir.inference import ir_logits, kl_divergence, log_softmax
from ..model_dir.manifest import MODEL_XML

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["cost", "cost_between", "text_ids"]

# Tokens of TEXT that are used; a byte-level tokenizer would make three times as many.
TEXT_TOKENS = 512
# Written for this purpose: a paragraph of prose, and one of code.
TEXT = """The harbour was built in three stages. First came the stone quay, which the merchants of the
old town paid for with a tax on salt; then, a century later, the long breakwater that still turns the
winter swell; and last the iron pier, which nobody loved and everybody used. When the railway reached the
coast, the fishing boats moved to the northern basin, and the warehouses behind the pier were filled with
timber, machine parts and tea. A visitor in those years would have seen clerks with ledgers under their
arms, children selling oranges, and at the end of the day a line of lamps along the water, lit one by one by
a man with a ladder. Engineers admired the harbour for another reason. Its basin empties and fills through a
narrow gate, and the tide keeps the channel deep enough for ships of moderate draught without any dredging.
The principle is simple: water that leaves quickly carries sand away, and water that arrives slowly drops it
elsewhere. To estimate the depth of such a channel, measure the volume of the basin, divide it by the time
of the falling tide, and compare the resulting speed with the speed at which sand begins to move.

def channel_speed(volume_m3, falling_tide_s, width_m, depth_m):
    \"\"\"Mean speed of the water in the gate, in metres per second.\"\"\"
    if falling_tide_s <= 0 or width_m * depth_m <= 0:
        raise ValueError("time and area must be positive")
    return volume_m3 / falling_tide_s / (width_m * depth_m)

for depth in (2.0, 2.5, 3.0):
    print(depth, round(channel_speed(180_000, 6 * 3600, 14.0, depth), 3))
"""


def text_ids(tokenizer: Any) -> list[int]:
    """The tokens of the text, by a transformers tokenizer."""
    ids: list[int] = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return ids[:TEXT_TOKENS]


def cost_between(source: Path, target: Path) -> dict[str, Any]:
    """The cost of a compressed model directory against the uncompressed one that it was made of; see `cost`."""
    ids = text_ids(load_hf_tokenizer(target))
    return cost(target / MODEL_XML, ids, ir_logits(source / MODEL_XML, ids))


def cost(ir: Path, ids: Sequence[int], expected: NDArray[np.float32]) -> dict[str, Any]:
    """KL divergence and top-1 agreement of a compressed model, at f32.

    Args:
        ir: Path of the compressed `openvino_model.xml`.
        ids: Token ids of the text.
        expected: Logits of the uncompressed model for them (tokens, vocabulary).

    Returns:
        tokens, kl_mean, kl_max (nats), top1_agreement, runtime.
    """
    measured = ir_logits(ir, ids)
    # Row by row: at f64 all rows of a large vocabulary would take gigabytes.
    rows = ((p.astype("f8"), q.astype("f8")) for p, q in zip(expected, measured, strict=True))
    divergence = [float(kl_divergence(log_softmax(p), log_softmax(q))) for p, q in rows]
    return {
        "tokens": len(ids),
        "kl_mean": statistics.fmean(divergence),
        "kl_max": max(divergence),
        "top1_agreement": float((expected.argmax(-1) == measured.argmax(-1)).mean()),
        "runtime": "f32",
    }
