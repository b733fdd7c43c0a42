"""Computed prompts: files and folders of states without a model, and a tiny model that uses them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ov_afm.errors import ConfigError, DeviceError, SourceError
from ov_afm.model_dir.inference import EXACT
from ov_afm.pipeline import Params, Pipeline, PromptCache, Use
from ov_afm.runtime.prompt_files import PromptFile, PromptFolder
from ov_afm.runtime.stateful import PIECE_TOKENS, StatefulEngine

SAMPLED = Params(max_new_tokens=24, temperature=1.0, seed=7, ignore_eos=True)
PREFIX = " ".join(f"Paris {number}: the quick fox, the lazy dog." for number in range(30))


def states(blocks: int = 3) -> list[tuple[str, Any]]:
    """Keys and values of a layer: (blocks, bytes)."""
    random = np.random.default_rng(1)
    return [(name, random.integers(0, 256, (blocks, 40), np.uint8)) for name in ("key_cache.0", "value_cache.0")]


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int64)


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    PromptFile.write(tmp_path / "a.kv", "model", ids(1, 2, 3), states())
    file = PromptFile.read(tmp_path / "a.kv")
    assert (file.identity, file.tokens.tolist()) == ("model", [1, 2, 3])
    for count in (3, 2):
        for (name, expected), (found_name, found) in zip(states(), file.states(count), strict=True):
            assert found_name == name
            assert np.array_equal(found, expected[:count])


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    PromptFile.write(path, "model", ids(*range(6)), states())
    whole = path.read_bytes()

    def read_all() -> None:
        for _ in PromptFile.read(path).states(3):
            pass

    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(SourceError) as error:
            read_all()
        assert error.value.code == "prompt-damaged", place
    for length in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError) as error:
            read_all()
        assert error.value.code == "prompt-damaged", length


def test_an_interrupted_write_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    PromptFile.write(path, "model", ids(1), states(1))
    before = path.read_bytes()

    def interrupted() -> Iterator[tuple[str, Any]]:
        yield from states(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PromptFile.write(path, "model", ids(1, 2), interrupted())
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a.kv", before)]


def test_the_folder_finds_the_longest_beginning_of_its_own_model(tmp_path: Path) -> None:
    folder = PromptFolder(tmp_path, 1e9, "mine")
    folder.keep(ids(1, 2, 3), states(3))
    folder.keep(ids(1, 2, 9, 9, 9), states(5))
    PromptFolder(tmp_path, 1e9, "other").keep(ids(1, 2, 3, 4, 5, 6), states())
    best = folder.best(ids(1, 2, 3, 4, 5, 6))
    assert best is not None
    assert (best[0].tokens.tolist(), best[1]) == ([1, 2, 3], 3)
    assert folder.best(ids(7, 7)) is None


def test_a_longer_prompt_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    folder = PromptFolder(tmp_path, 1e9, "mine")
    folder.keep(ids(1, 2), states(2))
    folder.keep(ids(1, 2, 3), states(3))
    assert len(list(tmp_path.iterdir())) == 1
    best = folder.best(ids(1, 2, 3))
    assert best is not None and best[1] == 3


def test_the_least_recently_used_prompts_make_room(tmp_path: Path) -> None:
    folder = PromptFolder(tmp_path, 1e9, "mine")
    for token in (1, 2, 3):
        folder.keep(ids(token), states(1))
    size = next(tmp_path.iterdir()).stat().st_size
    for age, token in enumerate((3, 2, 1)):
        best = folder.best(ids(token))
        assert best is not None
        os.utime(best[0].path, (time.time() - age - 10,) * 2)
    oldest = folder.best(ids(1))
    assert oldest is not None
    folder.used(oldest[0])
    small = PromptFolder(tmp_path, 2.5 * size, "mine")
    small.keep(ids(4), states(1))
    assert [token for token in (1, 2, 3, 4) if small.best(ids(token))] == [1, 4]


def test_a_prompt_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    folder = PromptFolder(tmp_path, 10, "mine")
    folder.keep(ids(1), states(1))
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_deleted_when_they_are_old(tmp_path: Path) -> None:
    old, young = tmp_path / ".1-1.a.kv", tmp_path / ".2-2.b.kv"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    PromptFolder(tmp_path, 1e9, "mine").keep(ids(1), states(1))
    assert not old.exists()
    assert young.exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as error:
        PromptFolder(tmp_path / "file", 1e9, "mine")
    assert error.value.code == "prompt-folder"


# -- With a model


def load(model: Path, folder: Path, **properties: Any) -> Pipeline:
    return Pipeline(model, prompt_cache=PromptCache(folder), **{**EXACT, **properties})


def ask(pipeline: Pipeline, question: str = "What?") -> tuple[str, int]:
    """The sampled answer to a long prompt, and the tokens of it that were not computed."""
    text = pipeline.generate(f"{PREFIX} {question}", SAMPLED, raw=True).text
    engine = pipeline._session.engine
    assert isinstance(engine, StatefulEngine)
    return text, engine.cached_tokens


@pytest.fixture(scope="module")
def kept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with one prompt, and the answer of the engine that kept it."""
    folder = tmp_path_factory.mktemp("prompts")
    with load(tiny_model, folder) as pipeline:
        answer, cached = ask(pipeline)
    assert cached == 0
    return folder, answer


def test_answers_are_those_of_genai(tiny_model: Path, kept: tuple[Path, str]) -> None:
    with Pipeline(tiny_model, **EXACT) as pipeline:
        assert pipeline.generate(f"{PREFIX} What?", SAMPLED, raw=True).text == kept[1]


def test_a_kept_prompt_is_used_after_a_restart_and_changes_nothing(tiny_model: Path, kept: tuple[Path, str]) -> None:
    folder, answer = kept
    with load(tiny_model, folder) as pipeline:
        from_disk = ask(pipeline)
        from_memory = ask(pipeline)
        other, cached = ask(pipeline, "Why?")
        again = ask(pipeline)
    assert from_disk == from_memory == again
    assert from_disk[0] == answer
    assert from_disk[1] == cached >= 2 * PIECE_TOKENS
    with Pipeline(tiny_model, **EXACT) as pipeline:
        assert pipeline.generate(f"{PREFIX} Why?", SAMPLED, raw=True).text == other


def test_the_defaults_of_the_cpu_are_exact_too(tiny_model: Path, tmp_path: Path) -> None:
    # Half precision and a cache of 8 bits on many CPUs: nothing else computes the same, to be compared with.
    with Pipeline(tiny_model, prompt_cache=PromptCache(tmp_path)) as pipeline:
        cold = [ask(pipeline, question) for question in ("What?", "Why?")]
        warm = [ask(pipeline, question) for question in ("What?", "Why?")]
    with Pipeline(tiny_model, prompt_cache=PromptCache(tmp_path)) as pipeline:
        disk = [ask(pipeline, question) for question in ("Why?", "What?")]
    assert [text for text, _ in cold] == [text for text, _ in warm] == [text for text, _ in disk[::-1]]
    assert min(cached for _, cached in [*warm, *disk]) > 0


def test_a_damaged_prompt_is_ignored(
    tiny_model: Path, kept: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = next(kept[0].iterdir())
    data = bytearray(source.read_bytes())
    data[1000] ^= 1  # within a block
    (tmp_path / source.name).write_bytes(data)
    with caplog.at_level(logging.WARNING), load(tiny_model, tmp_path) as pipeline:
        assert ask(pipeline) == (kept[1], 0)
    assert "computed again" in caplog.text
    assert next(tmp_path.iterdir()).read_bytes() != data  # replaced by a whole one


def test_other_properties_are_another_model(tiny_model: Path, kept: tuple[Path, str]) -> None:
    with load(tiny_model, kept[0], KV_CACHE_PRECISION="f16") as pipeline:
        assert ask(pipeline)[1] == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"prompt_lookup": True}, "prompt-cache-option"),
        ({"use": Use(prefix_caching=False)}, "prompt-cache-option"),
        ({"ATTENTION_BACKEND": "SDPA"}, "prompt-cache-option"),
    ],
    ids=["lookup", "no prefix caching", "backend"],
)
def test_what_does_not_go_together_is_refused(tiny_model: Path, options: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as error:
        Pipeline(tiny_model, prompt_cache=PromptCache(), **options)
    assert error.value.code == code


def test_other_devices_are_refused(tiny_model: Path) -> None:
    with pytest.raises(DeviceError) as error:
        Pipeline(tiny_model, "NPU-EMULATED", fallback=False, prompt_cache=PromptCache())
    assert "CPU only" in str(error.value)
