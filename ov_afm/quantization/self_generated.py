"""Calibration text from the model itself: chats that it writes after nothing but the beginning of its template.

A chat model that is given no more than the beginning of a user's turn writes a likely user's turn, then its own answer
(Magpie, https://arxiv.org/abs/2406.08464). Such data need not be collected and has the form that the model will see,
but it holds nothing that the model does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model_dir.inference import EXACT, decoder_inputs, input_names

__all__ = ["sample_texts"]

SEED = 0
TEMPERATURE = 1.0
TOP_K = 50
# Sequences that are written together: a step costs little more for many than for one.
BATCH = 32


def sample_texts(ir: Path, tokenizer: Any, count: int, tokens: int) -> Iterator[str]:
    """Chats written by an uncompressed IR at f32; the same for the same model.

    Args:
        ir: Path of `openvino_model.xml`.
        tokenizer: Its transformers tokenizer.
        count: How many.
        tokens: Length of each.
    """
    import openvino

    opening = _opening(tokenizer)
    random = np.random.default_rng(SEED)
    compiled = openvino.Core().compile_model(ir, "CPU", EXACT)
    while count > 0:
        rows = min(BATCH, count)
        count -= rows
        ids = _continue(compiled, opening, rows, tokens, random)
        yield from (tokenizer.decode(row, skip_special_tokens=False) for row in ids.tolist())


def _opening(tokenizer: Any) -> list[int]:
    """Ids of the template up to the first words of the user."""
    mark = "@@@"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
        ids: list[int] = tokenizer(text.partition(mark)[0], add_special_tokens=False)["input_ids"]
        if ids:
            return ids
    return [next(token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None)]


def _continue(
    compiled: Any, opening: list[int], rows: int, tokens: int, random: np.random.Generator
) -> NDArray[np.int64]:
    request, names = compiled.create_infer_request(), input_names(compiled)
    ids = np.tile(np.array(opening, dtype=np.int64), (rows, 1))
    fresh, past = ids, 0
    while ids.shape[1] < tokens:
        request.infer(decoder_inputs(fresh, names, past=past))
        past += fresh.shape[1]
        fresh = _draw(request.get_tensor("logits").data[:, -1], random)[:, None]
        ids = np.concatenate([ids, fresh], axis=1)
    return ids


def _draw(logits: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.int64]:
    """One token a row, by temperature and top-k."""
    count = min(TOP_K, logits.shape[1])
    best = np.argpartition(logits, -count, axis=1)[:, -count:]
    scores = np.take_along_axis(logits, best, axis=1) / TEMPERATURE
    # Gumbel's trick: the largest of score + noise is a draw from the softmax.
    choice = (scores + random.gumbel(size=scores.shape)).argmax(1)
    drawn: NDArray[np.int64] = best[np.arange(len(best)), choice].astype(np.int64)
    return drawn
