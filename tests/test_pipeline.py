"""A real tiny model in the real engine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from ov_afm.errors import ConfigError, DeviceError, GenerationError, OVAFMError, SourceError
from ov_afm.model_dir.inference import EXACT
from ov_afm.pipeline import Params, Pipeline, PromptCache
from ov_afm.runtime import drafting, model_session
from ov_afm.runtime.generation_config import default_config

GREEDY = Params(max_new_tokens=40, greedy=True, ignore_eos=True)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "def add(a, b):\n    return a + b  # 你好 🙂 <|im_end|>"},
    {"role": "assistant", "content": "  spaces  kept\t"},
    {"role": "user", "content": "  and?\n\n"},
]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Iterator[Pipeline]:
    with Pipeline(tiny_model, **EXACT) as loaded:
        yield loaded


def copy_without_manifest(model: Path, target: Path, **generation_config: Any) -> Path:
    shutil.copytree(model, target)
    (target / "ov_afm.json").unlink(missing_ok=True)
    tiny.edit_json(target / "generation_config.json", **generation_config)
    return target


def tokenizer(pipeline: Pipeline) -> Any:
    import openvino_genai

    return openvino_genai.Tokenizer(pipeline.model_dir)


def greedy_tokens(pipeline: Pipeline, prompt: str, count: int) -> list[int]:
    """What GenAI generates without ov_afm."""
    import openvino_genai

    engine = openvino_genai.LLMPipeline(pipeline.model_dir, "CPU", **EXACT)
    inputs = engine.get_tokenizer().encode(pipeline.render(prompt), add_special_tokens=False)
    tokens: list[int] = engine.generate(inputs, max_new_tokens=count, do_sample=False, ignore_eos=True).tokens[0]
    return tokens


def test_stream_joins_to_what_generate_returns(pipeline: Pipeline) -> None:
    deltas = list(pipeline.stream("hello", GREEDY))
    whole = pipeline.generate("hello", GREEDY)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert whole.text
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.finish_reason == "length"
    assert deltas[-1].metrics is not None


def test_text_is_what_the_detokenizer_makes_of_the_tokens(pipeline: Pipeline) -> None:
    tokens = greedy_tokens(pipeline, "hello", 40)
    assert len(tokens) == 40
    text = tokenizer(pipeline).decode(tokens)
    answer = pipeline.generate("hello", GREEDY).text
    assert answer in (text, text.removesuffix("\ufffd"))


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:2], CHAT[:2]], ids=["turns", "user", "system"])
def test_prompt_ids_equal_transformers_chat_template(
    pipeline: Pipeline, tiny_checkpoint: Path, messages: list[dict[str, str]]
) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_checkpoint)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert pipeline.render(messages) == expected
    ids = tokenizer(pipeline).encode(expected, add_special_tokens=False).input_ids.data[0].tolist()
    assert ids == reference(expected, add_special_tokens=False)["input_ids"]
    assert pipeline.count_tokens(messages) == len(ids)


def test_text_is_templated_once(pipeline: Pipeline) -> None:
    as_message = pipeline.generate([{"role": "user", "content": "hi"}], GREEDY)
    as_text = pipeline.generate("hi", GREEDY)
    rendered = pipeline.generate(pipeline.render("hi"), GREEDY, raw=True)
    assert as_text.metrics.prompt_tokens == as_message.metrics.prompt_tokens == rendered.metrics.prompt_tokens
    assert as_text.text == as_message.text == rendered.text


def test_raw_text_gets_no_template(pipeline: Pipeline) -> None:
    assert pipeline.count_tokens("hi", raw=True) < pipeline.count_tokens("hi")


def test_token_counts_are_exact(pipeline: Pipeline) -> None:
    for wanted in (1, 2, 17):
        metrics = pipeline.generate("hi", Params(max_new_tokens=wanted, greedy=True, ignore_eos=True)).metrics
        assert metrics.new_tokens == wanted
        assert metrics.prompt_tokens == pipeline.count_tokens("hi")
        assert (metrics.tpot_ms is None) == (wanted == 1)
        assert 0 < metrics.ttft_ms <= metrics.total_ms


def test_same_seed_gives_the_same_answer_and_another_seed_another(pipeline: Pipeline) -> None:
    def answer(seed: int | None) -> str:
        return pipeline.generate("hi", Params(max_new_tokens=20, temperature=1.0, seed=seed)).text

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in (1, 2, 3)}) == 3
    assert len({answer(None) for _ in range(3)}) > 1


def test_repetition_penalty_reaches_the_engine(pipeline: Pipeline) -> None:
    plain = pipeline.generate("hi", GREEDY).text
    penalised = pipeline.generate(
        "hi", Params(max_new_tokens=40, greedy=True, ignore_eos=True, repetition_penalty=5.0)
    ).text
    assert plain != penalised


def test_stop_string_over_several_tokens_never_leaks(pipeline: Pipeline) -> None:
    full = list(pipeline.stream("hello", GREEDY))
    text = "".join(delta.text for delta in full)
    # From the middle of one delta into the next.
    border = len("".join(delta.text for delta in full[: len(full) // 2]))
    stop = text[border - 2 : border + 2]
    deltas = list(pipeline.stream("hello", Params(max_new_tokens=40, greedy=True, ignore_eos=True, stop=(stop,))))
    assert "".join(delta.text for delta in deltas) == text[: text.find(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].tokens < 40


def test_stop_string_that_does_not_come_changes_nothing(pipeline: Pipeline) -> None:
    plain = pipeline.generate("hello", GREEDY)
    guarded = pipeline.generate("hello", Params(max_new_tokens=40, greedy=True, ignore_eos=True, stop=("never said",)))
    assert (guarded.text, guarded.finish_reason) == (plain.text, "length")


def test_end_of_text_token_ends_the_answer(tiny_model: Path, tmp_path: Path, pipeline: Pipeline) -> None:
    tokens = greedy_tokens(pipeline, "hello", 10)
    end = next(index for index in range(1, 10) if tokens[index] not in tokens[:index])
    copy = copy_without_manifest(tiny_model, tmp_path / "copy", eos_token_id=tokens[end])
    with Pipeline(copy, **EXACT) as other:
        answer = other.generate("hello", Params(max_new_tokens=40, greedy=True))
        assert answer.finish_reason == "stop"
        assert answer.metrics.new_tokens == end + 1


def test_dropping_the_iterator_leaves_the_pipeline_usable(pipeline: Pipeline) -> None:
    stream = pipeline.stream("hello", Params(max_new_tokens=2000, greedy=True, ignore_eos=True))
    next(stream)
    stream.close()
    assert pipeline.generate("hello", GREEDY).metrics.new_tokens == 40
    assert not [thread for thread in threading.enumerate() if thread.name == "ov_afm-generate"]


def test_cancel_from_another_thread_ends_the_answer_early(pipeline: Pipeline) -> None:
    cancel = threading.Event()
    stream = pipeline.stream("hello", Params(max_new_tokens=2000, greedy=True, ignore_eos=True), cancel=cancel)
    next(stream)
    threading.Thread(target=cancel.set).start()
    *_, last = stream
    assert last.finish_reason == "cancelled"
    assert last.metrics is not None
    assert last.metrics.new_tokens < 2000
    assert pipeline.generate("hello", GREEDY).finish_reason == "length"


def test_request_cancelled_while_it_waits_never_runs(pipeline: Pipeline) -> None:
    running = pipeline.stream("hello", Params(max_new_tokens=2000, greedy=True, ignore_eos=True))
    next(running)
    cancel = threading.Event()
    cancel.set()
    answer = pipeline.generate("hi", GREEDY, cancel=cancel)
    assert (answer.finish_reason, answer.metrics.new_tokens, answer.text) == ("cancelled", 0, "")
    running.close()


def test_requests_from_threads_do_not_mix(pipeline: Pipeline) -> None:
    prompts = [f"question {number}" for number in range(6)]
    expected = {prompt: pipeline.generate(prompt, GREEDY).text for prompt in prompts}
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda each=prompt: found.update({each: pipeline.generate(each, GREEDY).text}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("prompt", ["", []], ids=["text", "messages"])
def test_empty_prompt_is_refused(pipeline: Pipeline, prompt: Any) -> None:
    with pytest.raises(GenerationError, match="^the prompt has 0 tokens"):
        pipeline.stream(prompt)


def test_prompt_beyond_the_context_is_refused_with_both_counts(pipeline: Pipeline) -> None:
    prompt = "word " * 3000
    count = pipeline.count_tokens(prompt)
    with pytest.raises(GenerationError, match=f"has {count} tokens .* the context is {pipeline.context_length} tokens"):
        pipeline.stream(prompt)


@pytest.mark.slow
def test_answer_stops_where_the_context_ends(pipeline: Pipeline) -> None:
    prompt = "🙂" * 2000
    while pipeline.count_tokens(prompt) > pipeline.context_length - 3:
        prompt = prompt[:-1]
    answer = pipeline.generate(prompt, Params(max_new_tokens=500, greedy=True, ignore_eos=True))
    assert answer.metrics.prompt_tokens + answer.metrics.new_tokens == pipeline.context_length
    assert answer.finish_reason == "length"


def test_lone_surrogate_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(GenerationError, match="not valid Unicode: lone surrogate at character"):
        pipeline.stream("a\ud800b")


def test_messages_that_the_template_cannot_render_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(GenerationError, match="^the chat template cannot render these messages"):
        pipeline.stream([{"role": "user", "content": object()}])


def test_raw_messages_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="raw takes text"):
        pipeline.stream(CHAT, raw=True)


def test_engine_failure_arrives_as_generation_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_range(folder: Path) -> Any:
        config = default_config(folder)
        config.repetition_penalty = -1.0
        return config

    monkeypatch.setattr(model_session, "default_config", out_of_range)
    with Pipeline(tiny_model, warm_up=False) as broken:
        with pytest.raises(GenerationError, match="^the engine failed on CPU: .*repetition_penalty"):
            list(broken.stream("hi", Params(max_new_tokens=5)))
        assert broken.generate("hi", replace(GREEDY, repetition_penalty=1.0)).metrics.new_tokens == 40


def test_closed_pipeline_refuses_requests(tiny_model: Path) -> None:
    closed = Pipeline(tiny_model, warm_up=False)
    closed.close()
    with pytest.raises(GenerationError, match="the pipeline is closed"):
        closed.generate("hi")


def test_prompt_lookup_gives_the_same_greedy_answer(pipeline: Pipeline, tiny_model: Path) -> None:
    with Pipeline(tiny_model, prompt_lookup=True, **EXACT) as other:
        prompt = "one two three one two three one two"
        assert other.generate(prompt, GREEDY).text == pipeline.generate(prompt, GREEDY).text


def test_an_answer_continued_with_drafts_of_another_length_is_the_same(
    pipeline: Pipeline, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def change(drafting: drafting.Drafting, token: int) -> bool:
        drafting._add(token)
        drafting.left -= 1
        if drafting.left % 7 or not drafting.left:
            return False
        drafting.length = drafting.left % 4 + 1
        lengths.append(drafting.length)
        return True

    monkeypatch.setattr(drafting.Drafting, "push", change)
    with Pipeline(tiny_model, prompt_lookup=True, **EXACT) as other:
        for prompt in ("one two three one two three one two", "def add(a, b):"):
            expected, got = pipeline.generate(prompt, GREEDY), other.generate(prompt, GREEDY)
            assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
            assert got.metrics.new_tokens == expected.metrics.new_tokens
        assert lengths == [4, 1, 2, 3, 4] * 2  # with 35, 28, 21, 14 and 7 tokens left
        penalized = replace(GREEDY, presence_penalty=0.5)
        assert other.generate("hi", penalized).text == pipeline.generate("hi", penalized).text
        assert len(lengths) == 10
    with Pipeline(tiny_model, prompt_lookup=True, num_assistant_tokens=2, **EXACT) as fixed:
        assert fixed.generate("hi", GREEDY).metrics.new_tokens == GREEDY.max_new_tokens
    assert len(lengths) == 10


def test_draft_model_gives_the_same_greedy_answer(pipeline: Pipeline, tiny_model: Path) -> None:
    with Pipeline(tiny_model, draft_model=tiny_model, **EXACT) as other:
        assert other.generate("hello", GREEDY).text == pipeline.generate("hello", GREEDY).text


@pytest.mark.slow
def test_emulated_npu_answers_and_says_that_it_is_emulated(tiny_model: Path) -> None:
    with Pipeline(tiny_model, "NPU-EMULATED", MAX_PROMPT_LEN=128, MIN_RESPONSE_LEN=64) as emulated:
        assert emulated.emulated
        assert "emulated NPU" in emulated.device_note
        assert emulated.generate("hi", GREEDY).metrics.new_tokens == 40
        assert emulated.context_length == 192
        count = emulated.count_tokens("word " * 100)
        with pytest.raises(GenerationError, match=f"has {count} tokens, .* up to 128; .* MAX_PROMPT_LEN="):
            emulated.stream("word " * 100)


def test_loading_names_its_steps_and_how_long_they_took_last_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    phases: list[tuple[str, float | None]] = []

    def loaded() -> dict[str, float]:
        phases.clear()
        with Pipeline(tiny_model, on_phase=lambda *phase: phases.append(phase)) as pipeline:
            return pipeline.load_s

    tested = loaded()
    assert phases == [("loading on CPU", None), ("warming up CPU and comparing its first answer", None)]
    first = loaded()
    assert phases == [("loading on CPU", tested["loading on CPU"]), ("warming up CPU", None)]
    loaded()
    assert phases == list(first.items())


def test_directory_without_manifest_loads(tiny_model: Path, tmp_path: Path) -> None:
    with Pipeline(copy_without_manifest(tiny_model, tmp_path / "copy"), warm_up=False) as plain:
        assert plain.manifest is None
        assert plain.generate("hi", GREEDY).metrics.new_tokens == 40


@pytest.mark.parametrize("source", ["arcee-ai/AFM-4.5B", "smollm2-135m-instruct"])
def test_source_in_place_of_a_model_directory_names_the_export_command(source: str) -> None:
    with pytest.raises(SourceError, match=f"ov-afm export {source} --output DIR"):
        Pipeline(source)


def test_damaged_weights_are_named_before_loading(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    weights = copy / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"openvino_model\.bin is damaged"):
        Pipeline(copy)


def test_property_that_the_plugin_does_not_know_is_one_line(tiny_model: Path) -> None:
    with pytest.raises(DeviceError, match="Unsupported property NO_SUCH_PROPERTY by CPU plugin"):
        Pipeline(tiny_model, NO_SUCH_PROPERTY=1)


def test_importing_the_pipeline_loads_no_heavy_module() -> None:
    code = (
        "import sys, ov_afm.pipeline, ov_afm.cli.generate; "
        "print([m for m in ('openvino', 'torch', 'transformers', 'nncf', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_saved_prompt_gives_the_same_answers(pipeline: Pipeline, tiny_model: Path, tmp_path: Path) -> None:
    system = {"role": "system", "content": "The quick brown fox jumps over the lazy dog. " * 20}
    chat = [system, {"role": "user", "content": "What?"}]
    path, expected = tmp_path / "system.kv", pipeline.generate(chat, GREEDY).text
    with Pipeline(tiny_model, prompt_cache=PromptCache(), **EXACT) as saving:
        tokens = saving.save_prompt([system], path)
    assert 0 < tokens <= pipeline.count_tokens([system])
    with Pipeline(tiny_model, prompt_cache=PromptCache(), **EXACT) as loading:
        assert loading.load_prompt(path) == tokens
        assert loading.generate(chat, GREEDY).text == expected
        assert loading._session.engine.cached_tokens == tokens
        # Another prompt in between; the file is read again.
        assert loading.generate("Paris?", GREEDY).text == pipeline.generate("Paris?", GREEDY).text
        assert loading.generate(chat, GREEDY).text == expected
        assert loading._session.engine.cached_tokens == tokens


def test_prompts_that_cannot_be_saved_or_loaded(
    pipeline: Pipeline, tiny_model: Path, tiny_fp32: Path, tmp_path: Path
) -> None:
    path, text = tmp_path / "p.kv", "The quick brown fox. " * 40

    def code(call: Any, kind: type[OVAFMError]) -> str:
        with pytest.raises(kind) as error:
            call()
        return error.value.code

    assert code(lambda: pipeline.save_prompt(text, path), ConfigError) == "no-prompt-cache"
    with Pipeline(tiny_model, prompt_cache=PromptCache(), **EXACT) as saving:
        assert code(lambda: saving.save_prompt("short", path), GenerationError) == "prompt-too-short"
        assert code(lambda: saving.save_prompt(text, tmp_path / "none" / "p.kv"), OVAFMError) == "prompt-unwritable"
        assert code(lambda: saving.load_prompt(path), SourceError) == "prompt-unreadable"
        saving.save_prompt(text, path)
    with Pipeline(tiny_fp32, prompt_cache=PromptCache(), **EXACT) as other:
        assert code(lambda: other.load_prompt(path), SourceError) == "prompt-other-model"
    path.write_bytes(path.read_bytes()[:-1])
    with Pipeline(tiny_model, prompt_cache=PromptCache(), **EXACT) as loading:
        assert code(lambda: loading.load_prompt(path), SourceError) == "prompt-damaged"
