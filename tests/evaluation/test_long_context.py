"""Long context: needles and perplexity along the context."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.evaluation import long_context
from ov_afm.evaluation.text import Encoder, load_text
from ov_afm.model_dir.inference import ir_logits, log_softmax
from ov_afm.system import resources
from ov_afm.system.console import Progress


def along(model: Path, max_tokens: int | None) -> long_context.LongContext:
    with Progress() as progress:
        return long_context.long_context(model, load_text(), progress, max_tokens=max_tokens)


def test_perplexity_by_position_is_that_of_one_long_passage(tiny_fp32: Path) -> None:
    found = along(tiny_fp32, 600)
    ids = Encoder(tiny_fp32)(load_text().content)[:600]
    log_p = log_softmax(ir_logits(tiny_fp32 / "openvino_model.xml", ids))[:-1]
    nll = -log_p[np.arange(599), ids[1:]]
    expected = [(first, end, math.exp(nll[first:end].mean())) for first, end in ((0, 128), (128, 256), (256, 512))]
    assert found.perplexity[:3] == tuple((first, end, pytest.approx(value, rel=1e-3)) for first, end, value in expected)
    assert found.perplexity[3][:2] == (512, 599)
    assert (found.context, found.tried) == (2560, 600)


def test_needles_are_asked_at_every_length_and_depth_and_kept(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = along(tiny_model, 600)
    assert [(each.tokens, each.depth) for each in found.needles] == [
        (length, depth) for length in (256, 512, 600) for depth in long_context.DEPTHS
    ]
    # Random weights find nothing.
    assert not any(each.found for each in found.needles)
    monkeypatch.setattr(long_context, "IrModel", lambda *_, **__: pytest.fail("the model was loaded"))
    assert along(tiny_model, 600) == found


@pytest.mark.slow
def test_real_model_finds_the_needle(smollm2_model: Path) -> None:
    found = along(smollm2_model, 256)
    assert [each.found for each in found.needles] == [True, True, True]
    assert "| 256 | found" in long_context.markdown(found)


@pytest.mark.parametrize("tokens", [100, 2561])
def test_length_outside_the_context_is_refused(tiny_model: Path, tokens: int) -> None:
    with pytest.raises(ConfigError) as caught:
        along(tiny_model, tokens)
    assert caught.value.code == "long-tokens"
    assert str(caught.value) == (
        f"the longest prompt must lie between 256 and the model's context of 2560, found {tokens}"
    )


def test_cache_that_does_not_fit_in_memory_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 1000)
    with pytest.raises(OVAFMError, match="a prompt of 2560 tokens at f32 needs about 1.00 GB of memory"):
        along(tiny_model, None)
