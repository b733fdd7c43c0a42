"""A device is trusted when it answers as the model should, and refused with evidence when it does not."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import simulated_faults

from ov_afm.model_dir import manifest
from ov_afm.model_dir.inference import EXACT
from ov_afm.runtime import properties, self_test

GOLDEN: dict[str, Any] = {
    "prompts": [
        {
            "name": "short",
            "prompt_tokens": 5,
            "text": "q",
            "tokens": [11, 12, 13],
            "answer": "the right answer",
            "steps": ["11:-0.100 21:-2.900", "12:-0.500 22:-1.900", "13:-0.010"],
        }
    ]
}


@pytest.fixture(scope="module")
def golden(tiny_model: Path) -> dict[str, Any]:
    return self_test.make_golden(tiny_model)


def judged(*tokens: int, first: Sequence[tuple[int, float]] = ()) -> self_test.Verdict:
    return self_test.judge(GOLDEN, [{"tokens": list(tokens), "text": "what it said", "first": first}])


def test_same_answer_passes() -> None:
    assert judged(11, 12, 13) == self_test.Verdict(True, "short: all 3 tokens as recorded")


def test_close_call_is_rounding_and_what_follows_it_is_not_compared() -> None:
    verdict = judged(11, 22, 99)
    assert verdict.passed
    assert verdict.evidence == "short: 1 of 3 tokens as recorded, then a close call (1.4 nats)"


def test_first_tokens_probabilities_are_compared() -> None:
    assert judged(11, 12, 13, first=[(11, -0.1), (12, -0.5), (13, -0.01)]).evidence.endswith(", KL 0.000")
    # p = (0.905, 0.095), q = (0.5, 0.5): 0.905 ln 1.81 + 0.095 ln 0.19 = 0.379; steps two and three are not asked.
    verdict = judged(11, 12, 13, first=[(11, math.log(0.5))])
    assert not verdict.passed
    assert "short prompt: the probabilities of its first tokens are at least 0.38 nats (KL)" in verdict.evidence


def test_reported_divergence_is_a_lower_bound_of_the_whole_one() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        p, q = (random.dirichlet(np.full(8, 0.5)) + 1e-9 for _ in range(2))
        step = " ".join(f"{token}:{math.log(score)}" for token, score in enumerate(p))
        best, chosen = int(p.argmax()), int(q.argmax())
        golden = {"prompts": [{**GOLDEN["prompts"][0], "tokens": [best], "steps": [step]}]}
        answer = {"tokens": [best], "text": "", "first": [(chosen, math.log(q[chosen]))]}
        evidence = self_test.judge(golden, [answer]).evidence
        reported = re.search(r"KL (\d+\.\d+)|at least (\d+\.\d+) nats", evidence)
        assert reported is not None, evidence
        assert 0 <= float(reported[1] or reported[2]) <= float((p * np.log(p / q)).sum()) + 0.006


@pytest.mark.parametrize(
    ("tokens", "place"),
    [
        ((21, 12, 13), "token 1 is 2.8 nats"),
        ((11, 12, 99), "token 3 is more than 4.0 nats"),
        ((11,), "token 2 is more"),
    ],
    ids=["unlikely", "unheard-of", "ends-early"],
)
def test_wrong_answer_is_refused_with_the_evidence(tokens: tuple[int, ...], place: str) -> None:
    verdict = judged(*tokens)
    assert not verdict.passed
    assert "answered 'what it said' where the model says 'the right answer'" in verdict.evidence
    assert place in verdict.evidence


def test_prompt_that_did_not_fit_is_reported_not_failed() -> None:
    verdict = self_test.judge(GOLDEN, [None])
    assert verdict.passed
    assert "not run, 5 tokens are more than it was loaded for" in verdict.evidence


def test_golden_answers_are_json_with_a_prompt_beyond_2048_tokens(golden: dict[str, Any]) -> None:
    assert json.loads(json.dumps(golden)) == golden
    short, long = golden["prompts"]
    assert short["prompt_tokens"] < 100
    assert long["prompt_tokens"] > 2048
    assert self_test.NEEDLE in long["text"]
    assert all(1 <= len(prompt["tokens"]) == len(prompt["steps"]) <= 16 for prompt in (short, long))
    assert len(json.dumps(golden)) < 50_000


def test_reference_is_the_engines_own_answer_at_f32(golden: dict[str, Any], tiny_model: Path) -> None:
    prompts = golden["prompts"]
    answers = self_test.answers(tiny_model, "CPU", EXACT, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer is not None
        assert answer["tokens"][: len(prompt["tokens"])] == prompt["tokens"]
        assert [token for token, _ in answer["first"]] == prompt["tokens"][: len(answer["first"])]
    assert [len(answer["first"]) for answer in answers if answer] == [4, 0]
    assert self_test.judge(golden, answers).evidence.startswith("short: all 16 tokens as recorded, KL 0.000;")


def test_cpu_with_its_defaults_passes(golden: dict[str, Any], tiny_model: Path) -> None:
    assert self_test.run(tiny_model, golden, "CPU", {}).passed


@pytest.mark.slow
def test_emulated_npu_passes_and_finds_the_long_prompt_too_long(golden: dict[str, Any], tiny_model: Path) -> None:
    verdict = self_test.run(tiny_model, golden, "NPU", properties.build("NPU", emulated=True))
    assert verdict.passed
    assert "long: not run" in verdict.evidence


def test_model_with_wrong_weights_is_refused(golden: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "scrambled"
    shutil.copytree(tiny_model, other)
    # The embedding, 512 x 64 bytes, upside down: it loads and talks, about something else.
    place = re.search(r'element_type="u8" shape="512, 64" offset="(\d+)"', (other / "openvino_model.xml").read_text())
    assert place is not None
    begin = int(place[1])
    weights = bytearray((other / "openvino_model.bin").read_bytes())
    weights[begin : begin + 512 * 64] = weights[begin : begin + 512 * 64][::-1]
    (other / "openvino_model.bin").write_bytes(weights)
    verdict = self_test.run(other, golden, "CPU", {})
    assert not verdict.passed
    assert "less likely than the right one" in verdict.evidence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("device_that_crashes", "ended by SIGSEGV"),
        ("device_that_hangs", "no answer within 3 s"),
        ("device_that_talks_nonsense", "answered '!!!!!!!!!!!!!!!!' where the model says"),
    ],
)
def test_simulated_fault_fails_the_test(
    golden: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    simulated_faults.replace(monkeypatch, self_test, "answers", getattr(simulated_faults, fault))
    verdict = self_test.run(tiny_model, golden, "NPU", {}, timeout_s=3 if "hangs" in fault else 60)
    assert not verdict.passed
    assert reason in verdict.evidence


def test_load_failure_is_one_line(tiny_model: Path) -> None:
    verdict = self_test.run(tiny_model, None, "CPU", {"NO_SUCH_PROPERTY": 1})
    assert verdict == self_test.Verdict(
        False, "it failed to load or to answer: NotFound: Unsupported property NO_SUCH_PROPERTY by CPU plugin."
    )


@pytest.mark.slow
def test_real_model_finds_the_needle_and_its_recorded_answers_end_where_it_ends(smollm2_model: Path) -> None:
    contents = manifest.read(smollm2_model)
    assert contents
    short, long = contents.checks["golden"]["prompts"]
    assert "Paris" in short["answer"]
    assert long["needle_found"]
    assert len(short["tokens"]) < 16
