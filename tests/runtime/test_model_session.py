"""A loaded model has the same defaults, limits and errors wherever it generates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from ov_afm import Pipeline
from ov_afm.errors import ConfigError, GenerationError, SourceError
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.runtime.loading import LoadRequest
from ov_afm.runtime.model_session import ModelSession
from ov_afm.runtime.sampling import Params
from ov_afm.serve.messages import EngineSpec
from ov_afm.serve.sequential import open_engine


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a stop string and a repetition penalty as its defaults."""
    copy = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("sessions") / "model"))
    (copy / "ov_afm.json").unlink()
    tiny.edit_json(copy / "generation_config.json", stop_strings=["END"], repetition_penalty=1.5)
    return copy


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "prompt-lookup"])
def session(model: Path, request: pytest.FixtureRequest) -> Iterator[ModelSession]:
    loaded = ModelSession(LoadRequest(ModelDirectory.open(model), prompt_lookup=request.param), warm_up=False)
    yield loaded
    loaded.close()


def test_defaults_are_the_models_even_when_tokens_are_drafted(session: ModelSession) -> None:
    config = session.generation_config(Params(), prompt_tokens=1)
    assert config.repetition_penalty == 1.5
    assert config.stop_token_ids == {2}
    assert session.generation_config(Params(repetition_penalty=1.1), prompt_tokens=1).repetition_penalty == (
        pytest.approx(1.1)
    )


def test_end_of_text_is_the_tokenizers_where_the_model_names_none(tiny_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (copy / "ov_afm.json").unlink()
    (copy / "generation_config.json").unlink()
    session = ModelSession(LoadRequest(ModelDirectory.open(copy)), warm_up=False)
    assert session.generation_config(Params(), prompt_tokens=1).stop_token_ids == {session.tokenizer.get_eos_token_id()}


def test_answer_is_limited_to_the_context(session: ModelSession) -> None:
    config = session.generation_config(Params(max_new_tokens=10**6), prompt_tokens=100)
    assert config.max_new_tokens == session.context_length - 100


def test_request_without_a_seed_gets_another_each_time(session: ModelSession) -> None:
    seeds = {session.generation_config(Params(), prompt_tokens=1).rng_seed for _ in range(3)}
    assert len(seeds) == 3
    assert session.generation_config(Params(seed=7), prompt_tokens=1).rng_seed == 7


@pytest.mark.parametrize("stop", ["END", "mine"])
def test_stop_strings_are_left_to_the_assembler(session: ModelSession, stop: str) -> None:
    assert session.generation_config(Params(stop=("mine",)), prompt_tokens=1).stop_strings == set()
    assembler = session.assembler(("mine",))
    ids = session.tokenizer.encode(f"a {stop} b", add_special_tokens=False).input_ids.data[0]
    text = "".join([assembler.push(int(token)) for token in ids])
    assert assembler.stopped
    assert text == "a "


@pytest.mark.parametrize(
    ("tokens", "code"), [(0, "prompt-empty"), (2560, "prompt-exceeds-context")], ids=["empty", "too-long"]
)
def test_prompt_that_leaves_no_room_is_refused(session: ModelSession, tokens: int, code: str) -> None:
    assert session.context_length == 2560
    session.check_prompt_length(2559)
    with pytest.raises(GenerationError) as caught:
        session.check_prompt_length(tokens)
    assert caught.value.code == code


def test_limits_of_static_shapes_are_known(model: Path) -> None:
    properties = {"MAX_PROMPT_LEN": 128, "MIN_RESPONSE_LEN": 64}
    request = LoadRequest(ModelDirectory.open(model), "NPU-EMULATED", user_properties=properties)
    session = ModelSession(request, warm_up=False)
    assert (session.max_prompt_tokens, session.context_length) == (128, 192)
    session.check_prompt_length(128)
    with pytest.raises(GenerationError) as caught:
        session.check_prompt_length(129)
    assert caught.value.code == "prompt-exceeds-device"


def _pipeline(model: Path, **options: Any) -> object:
    return Pipeline(model, **options)


def _server(model: Path, **options: Any) -> object:
    return open_engine(EngineSpec(model, cache_size_gb=0.02, **options))


@pytest.mark.parametrize("load", [_pipeline, _server], ids=["pipeline", "server"])
def test_damaged_generation_config_is_the_same_error_everywhere(model: Path, tmp_path: Path, load: Any) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(SourceError) as caught:
        load(copy)
    assert caught.value.code == "generation-config-unreadable"
    assert str(copy / "generation_config.json") in str(caught.value)


@pytest.mark.parametrize("load", [_pipeline, _server], ids=["pipeline", "server"])
@pytest.mark.parametrize("precision", ["u8", "f16", "f32"])
def test_precision_of_the_cache_alone_loads_everywhere(model: Path, load: Any, precision: str) -> None:
    from ov_afm import pipeline

    options = {"use": pipeline.Use(kv_cache=precision)} if load is _pipeline else {"kv_cache": precision}
    loaded = load(model, **options)
    if load is _pipeline:
        loaded.close()


def test_options_that_exclude_each_other_are_refused_before_anything_is_loaded(tiny_model: Path) -> None:
    model = ModelDirectory.open(tiny_model)
    with pytest.raises(ConfigError, match="a draft model and prompt lookup exclude each other"):
        LoadRequest(model, draft_model=model, prompt_lookup=True)
    with pytest.raises(ConfigError, match="num_assistant_tokens must be at least 1, found 0"):
        LoadRequest(model, num_assistant_tokens=0)
