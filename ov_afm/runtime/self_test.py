"""Does a device answer as the model should?

A driver can compute nonsense without any error (https://github.com/openvinotoolkit/openvino/issues/37419).
So export records how the finished model answers two prompts on CPU at f32, with the log-probabilities
of the best other tokens. One prompt is longer than 2,048 tokens, with a needle to find. A device then
gets the same prompts. Its text may differ, because rounding may decide between two tokens that are
nearly as likely; but where it first differs, the reference must hold the device's token nearly as likely
as its own. After that place the two answer different questions, so nothing is compared there. For the
first tokens of the short prompt, each with the recorded ones before it, the probabilities are compared too.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OVAFMError, SourceError, last_line
from ..model_dir.inference import EXACT, decoder_inputs, input_names, log_softmax
from ..model_dir.manifest import MODEL_XML
from ..model_dir.model_directory import read_config
from ..system.child_process import ChildDied, ChildProcess
from .chat_template import ChatTemplate
from .stop_tokens import stop_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "ANSWER_TOKENS",
    "KL_NATS",
    "MARGIN_NATS",
    "ROOM_TOKENS",
    "Verdict",
    "answers",
    "ask",
    "judge",
    "make_golden",
    "run",
]

ANSWER_TOKENS = 16
# Long enough to need more than 2,048 positions, where reported faults begin.
LONG_TOKENS = 2112
# What a device with static shapes needs to be loaded for, to take the long prompt.
ROOM_TOKENS = 2304
# How much less likely than the reference's choice a device's first other token may be. Half precision and
# 8-bit activations move log-probabilities by tenths; a token at e^-2 of the best was not a close call.
MARGIN_NATS = 2.0
# Tokens of the short prompt whose probabilities are compared, and by how much they may differ in the mean (KL).
# SmolLM2 at 4 bits has 0.000 at the CPU's defaults and on the emulated NPU; chance among 64 tokens has whole nats.
FIRST_TOKENS = 4
KL_NATS = 0.25
# Each of them computes the prompt again.
SHORT_TOKENS = 128
# What is recorded of each step: the best candidates, down to well below the margin.
STORED = 64
STORED_NATS = 4.0
CHUNK_TOKENS = 256
TIMEOUT_S = 1800.0
QUESTION = "What is the capital of France? Answer in one word."
NO_ANSWER: Mapping[str, Any] = {"text": QUESTION, "tokens": []}
NEEDLE = "7316"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of a self-test.

    Attributes:
        passed: The device may be used.
        evidence: What was compared, or what went wrong, in one line.
    """

    passed: bool
    evidence: str


def make_golden(model_dir: Path) -> dict[str, Any]:
    """Record reference answers, for the manifest's `checks["golden"]`. Takes about a minute for 4.5 B parameters.

    Args:
        model_dir: The finished model directory.

    Returns:
        `{"runtime": "f32", "prompts": [{"name", "text", "prompt_tokens", "tokens", "answer", "steps", ...}]}`;
        `tokens` is the greedy answer of up to 16 tokens, and each of `steps` lists `token:log-probability` of the
        best candidates.
    """
    import openvino_genai

    tokenizer = openvino_genai.Tokenizer(model_dir)
    template = ChatTemplate.read(model_dir, tokenizer)
    reference = _Reference(model_dir, {token.id for token in stop_tokens(model_dir, tokenizer, template)})
    room = int(read_config(model_dir)["max_position_embeddings"]) - ANSWER_TOKENS
    prompts = []
    for name, text in (("short", QUESTION), ("long", _long_prompt(tokenizer, template, min(LONG_TOKENS, room)))):
        templated = _templated(template, text)
        ids = _ids(tokenizer, templated)
        tokens, steps = reference.answer(ids)
        answer = tokenizer.decode(tokens)
        entry = {"name": name, "prompt_tokens": len(ids), "text": templated, "tokens": tokens, "answer": answer}
        if name == "long":
            entry["needle_found"] = NEEDLE in answer
        prompts.append({**entry, "steps": steps})
    return {"runtime": "f32", "prompts": prompts}


def _long_prompt(tokenizer: Any, template: ChatTemplate | None, tokens: int) -> str:
    """A question about one line among many, in about this many tokens, template included."""

    def text(lines: int) -> str:
        rows = [f"Shelf {number} holds {number * 37 % 89} boxes of nails." for number in range(lines)]
        rows.insert(lines // 3, f"The secret number of the lighthouse is {NEEDLE}.")
        return "\n".join([*rows, "What is the secret number of the lighthouse? Answer with the number only."])

    def length(lines: int) -> int:
        return len(_ids(tokenizer, _templated(template, text(lines))))

    # A line has several tokens.
    return text(bisect.bisect_right(range(1, tokens), tokens, key=length))


def _templated(template: ChatTemplate | None, text: str) -> str:
    return text if template is None else template.render([{"role": "user", "content": text}])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(each) for each in tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]]


class _Reference:
    """The model on CPU at f32, token by token, with all logits at hand."""

    def __init__(self, folder: Path, end_tokens: set[int]) -> None:
        import openvino

        self._end_tokens = end_tokens
        compiled = openvino.Core().compile_model(folder / MODEL_XML, "CPU", EXACT)
        self._inputs = input_names(compiled)
        self._request = compiled.create_infer_request()

    def answer(self, ids: Sequence[int]) -> tuple[list[int], list[str]]:
        """Greedy answer to a prompt, up to its end, and the best candidates of each step."""
        import numpy as np

        self._request.reset_state()
        # In chunks: logits of a long prompt over a large vocabulary would take a gigabyte.
        for begin in range(0, len(ids), CHUNK_TOKENS):
            scores = self._step(ids[begin : begin + CHUNK_TOKENS], begin)
        tokens: list[int] = []
        steps: list[str] = []
        for position in range(len(ids), len(ids) + ANSWER_TOKENS):
            best = [int(each) for each in np.argsort(-scores)[:STORED]]
            kept = [token for token in best if scores[token] >= scores[best[0]] - STORED_NATS]
            steps.append(" ".join(f"{token}:{scores[token]:.3f}" for token in kept))
            tokens.append(best[0])
            if best[0] in self._end_tokens:
                break
            scores = self._step([best[0]], position)
        return tokens, steps

    def _step(self, ids: Sequence[int], past: int) -> NDArray[np.float64]:
        """Log-probabilities after some more tokens: (vocab,)."""
        self._request.infer(decoder_inputs(ids, self._inputs, past=past))
        return log_softmax(self._request.get_tensor("logits").data[0, -1].astype("f8"))


def judge(golden: Mapping[str, Any], given: Sequence[Mapping[str, Any] | None]) -> Verdict:
    """Compare a device's answers with the recorded ones.

    Args:
        golden: From `make_golden`.
        given: What `ask` gives for each prompt; None for one that did not fit the device.
    """
    notes = []
    for prompt, answer in zip(golden["prompts"], given, strict=True):
        name = prompt["name"]
        if answer is None:
            notes.append(f"{name}: not run, {prompt['prompt_tokens']} tokens are more than it was loaded for")
            continue
        verdict = _judge_tokens(prompt, answer)
        if not verdict.passed:
            return verdict
        divergence = _divergence(prompt["steps"], answer["first"])
        if divergence > KL_NATS:
            return Verdict(
                False,
                f"{name} prompt: the probabilities of its first tokens are at least {divergence:.2f} nats (KL) from "
                f"the model's (up to {KL_NATS:g} is rounding)",
            )
        close = f", KL {divergence:.3f}" if answer["first"] else ""
        notes.append(f"{name}: {verdict.evidence}{close}")
    return Verdict(True, "; ".join(notes))


def _judge_tokens(prompt: Mapping[str, Any], answer: Mapping[str, Any]) -> Verdict:
    expected, given = prompt["tokens"], answer["tokens"]
    pairs = enumerate(zip(expected, given, strict=False))
    at = next((place for place, (one, other) in pairs if one != other), len(given))
    if at >= len(expected):
        return Verdict(True, f"all {len(expected)} tokens as recorded")
    margin, beyond = _margin(prompt["steps"][at], given[at] if at < len(given) else None)
    if margin > MARGIN_NATS:
        return Verdict(
            False,
            f"{prompt['name']} prompt: answered {answer['text'][:60]!r} where the model says "
            f"{prompt['answer'][:60]!r}; token {at + 1} is {'more than ' if beyond else ''}{margin:.1f} nats less "
            f"likely than the right one (up to {MARGIN_NATS:g} is rounding)",
        )
    return Verdict(True, f"{at} of {len(expected)} tokens as recorded, then a close call ({margin:.1f} nats)")


def _scores(step: str) -> dict[int, float]:
    return {int(key): float(value) for key, _, value in (entry.partition(":") for entry in step.split())}


def _divergence(steps: Sequence[str], first: Sequence[tuple[int, float]]) -> float:
    """A lower bound of the mean KL divergence of a device's next tokens from the recorded ones, in nats.

    An engine reports the probability of the token that it chooses, so the two distributions are compared on "this token
    or another" only; merging outcomes never makes a divergence greater.
    """
    bounds = []
    for step, (token, score) in zip(steps, first, strict=False):
        recorded = _scores(step)
        chosen = recorded.get(token, max(recorded.values()) - STORED_NATS)
        p, q = (min(max(math.exp(each), 1e-6), 1 - 1e-6) for each in (chosen, score))
        bounds.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    return sum(bounds) / len(bounds) if bounds else 0.0


def _margin(step: str, token: int | None) -> tuple[float, bool]:
    """How much less likely than the best a token is, in nats, and whether that is only a lower bound.

    The bound is what was recorded: the whole range, or less where many candidates are about equal.
    """
    scores = _scores(step)
    best = max(scores.values())
    if token in scores:
        return best - scores[token], False
    return (best - min(scores.values()) if len(scores) == STORED else STORED_NATS), True


def run(
    model_dir: Path,
    golden: Mapping[str, Any] | None,
    device: str,
    properties: Mapping[str, Any],
    *,
    timeout_s: float = TIMEOUT_S,
) -> Verdict:
    """Load a model on a device in a child process, ask it the golden prompts, and judge.

    Args:
        model_dir: The model directory.
        golden: The manifest's `checks["golden"]`; None tests only that the device loads and answers.
        device: OpenVINO's name.
        properties: What to load it with; objects of GenAI, which cannot be sent to a child, are left out.
        timeout_s: Seconds after which it counts as hung.
    """
    plain = {key: value for key, value in properties.items() if isinstance(value, str | int | float | list)}
    prompts = golden["prompts"] if golden else [NO_ANSWER]
    try:
        given = ChildProcess(timeout_s=timeout_s).run(answers, model_dir, device, plain, prompts)
    except ChildDied as error:
        return Verdict(False, f"loading and asking it in a child process failed: {error}")
    except (OVAFMError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Verdict(False, f"it failed to load or to answer: {first}")
    if golden is None:
        return Verdict(True, "it loads and answers; the model has no recorded answers to compare with")
    return judge(golden, given)


def answers(
    model_dir: Path, device: str, properties: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any] | None]:
    """A device's answer to each prompt, None for one that is longer than it was loaded for.

    A faulty driver may end the process.
    """
    import openvino_genai

    try:
        engine = openvino_genai.LLMPipeline(model_dir, device, **properties)
        return [ask(engine, prompt, properties.get("MAX_PROMPT_LEN")) for prompt in prompts]
    except RuntimeError as error:
        raise SourceError(last_line(error)) from error


def ask(engine: Any, prompt: Mapping[str, Any], limit: int | None = None) -> dict[str, Any] | None:
    """Give one of the golden prompts to an engine.

    Args:
        engine: GenAI's `LLMPipeline` or `ContinuousBatchingPipeline`.
        prompt: `text` and the recorded `tokens`.
        limit: Tokens that a prompt may have.

    Returns:
        `tokens` and `text` of its greedy answer; `first`: of the first tokens, each with the recorded ones before it,
        the token it chooses and its log-probability, if the prompt is short. None if the prompt is too long.
    """
    tokenizer = engine.get_tokenizer()
    ids = _ids(tokenizer, prompt["text"])
    if limit is not None and len(ids) > limit:
        return None
    tokens, _ = _generate(engine, ids, ANSWER_TOKENS)
    first = []
    if len(ids) <= SHORT_TOKENS:
        for place in range(min(FIRST_TOKENS, len(prompt["tokens"]))):
            (token,), score = _generate(engine, [*ids, *prompt["tokens"][:place]], 1)
            first.append((token, score))
    return {"tokens": tokens, "text": tokenizer.decode(tokens), "first": first}


def _generate(engine: Any, ids: Sequence[int], count: int) -> tuple[list[int], float]:
    """Greedy tokens, and the sum of their log-probabilities."""
    import numpy as np
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.logprobs = count, True, 1
    row = openvino.Tensor(np.array([ids], np.int64))
    if isinstance(engine, openvino_genai.ContinuousBatchingPipeline):
        (result,) = engine.generate([row], [config])
        return [int(each) for each in result.m_generation_ids[0]], float(result.m_scores[0])
    inputs = openvino_genai.TokenizedInputs(row, openvino.Tensor(np.ones((1, len(ids)), np.int64)))
    result = engine.generate(inputs, config)
    return [int(each) for each in result.tokens[0]], float(result.scores[0])
