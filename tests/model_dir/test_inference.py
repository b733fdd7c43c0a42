"""Inputs of a decoder, log-probabilities and KL divergence, by hand-made numbers and a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ov_afm.model_dir.inference import EXACT, decoder_inputs, input_names, ir_logits, kl_divergence, log_softmax

NAMES = {"input_ids", "attention_mask", "position_ids", "beam_idx"}


def test_inputs_continue_after_what_is_cached() -> None:
    inputs = decoder_inputs([[1, 2], [3, 4]], NAMES, past=3)
    assert inputs["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert inputs["attention_mask"].tolist() == [[1] * 5] * 2
    assert inputs["position_ids"].tolist() == [[3, 4]] * 2
    assert inputs["beam_idx"].tolist() == [0, 1]
    assert [inputs[name].dtype for name in ("input_ids", "beam_idx")] == [np.int64, np.int32]


def test_one_row_may_be_a_list_and_absent_inputs_are_left_out() -> None:
    inputs = decoder_inputs([5, 6, 7], NAMES - {"position_ids"})
    assert inputs["input_ids"].tolist() == [[5, 6, 7]]
    assert set(inputs) == NAMES - {"position_ids"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_softmax_and_divergence(dtype: type) -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 1000.0]], dtype)
    log_p = log_softmax(logits)
    assert log_p.dtype == dtype
    np.testing.assert_allclose(np.exp(log_p), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
    divergence = kl_divergence(log_p, log_p[::-1].copy())
    assert divergence.dtype == dtype
    np.testing.assert_allclose(divergence, [0.25 * np.log(0.5) + 0.75 * np.log(1.5), 0.5 * np.log(4 / 3)], rtol=1e-5)
    assert (kl_divergence(log_p, log_p) == 0).all()


def test_tokens_in_parts_give_the_logits_of_the_whole(tiny_model: Path) -> None:
    import openvino

    ids = [5, 17, 250, 33, 8]
    whole = ir_logits(tiny_model / "openvino_model.xml", ids)
    compiled = openvino.Core().compile_model(tiny_model / "openvino_model.xml", "CPU", EXACT)
    names, request = input_names(compiled), compiled.create_infer_request()
    parts = []
    for past, part in ((0, ids[:2]), (2, ids[2:])):
        request.infer(decoder_inputs(part, names, past=past))
        parts.append(request.get_tensor("logits").data[0].copy())
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)
