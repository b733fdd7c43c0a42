"""The search: what it tries, what it chooses, and that it does not begin anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ov_afm.compress import resolve_recipe
from ov_afm.errors import ConfigError
from ov_afm.presets import Recipe
from ov_afm.tune import main, tune
from ov_afm.tune_trials import Trial, candidates, chosen, front, refinements


def trial(label: str, size: int, kl: float, refused: str | None = None) -> Trial:
    return Trial(label, Recipe("tuned", "int4", sym=True, group_size=64).to_dict(), size, kl, 0.9, 1.0, refused)


TRIALS = [
    trial("small", 100, 0.9),
    trial("worse", 110, 1.0),
    trial("middle", 120, 0.3),
    trial("large", 200, 0.01),
    trial("none", 0, float("inf"), "refused"),
]


def test_front_holds_what_nothing_beats() -> None:
    assert [each.label for each in front(TRIALS)] == ["small", "middle", "large"]


@pytest.mark.parametrize(
    ("size", "kl", "label"),
    [(150, None, "middle"), (None, 0.5, "middle"), (None, 0.01, "large"), (150, 0.95, "small"), (99, None, None)],
)
def test_choice_keeps_to_the_bounds(size: float | None, kl: float | None, label: str | None) -> None:
    found = chosen(TRIALS, size, kl)
    assert (found.label if found else None) == label


def test_every_recipe_of_the_search_is_a_recipe() -> None:
    first = list(candidates())
    second = [pair for label, recipe in first for pair in refinements(Trial(label, recipe.to_dict()))]
    labels = [label for label, _ in first + second]
    assert len(set(labels)) == len(labels)
    assert {recipe.bits for _, recipe in first} == {4, 8}
    assert any(recipe.gptq for _, recipe in second)
    assert any(recipe.rounding == "fitted" for _, recipe in second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tune needs a bound: add --max-size-gb GB, or --max-kl NATS"),
        ({"max_kl": 0.0}, "the bound of KL divergence must be positive, found 0.0"),
        ({"max_size_gb": -1.0}, "the bound of size must be positive, found -1.0"),
        ({"max_kl": 1.0, "minutes": 0.0}, "the bound of minutes must be positive, found 0.0"),
    ],
)
def test_bad_bounds_are_refused_before_any_work(tmp_path: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tune("none", tmp_path / "out.json", **options)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_recipe_goes_to_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^the recipe is written to a .json file, found "):
        tune("none", tmp_path / "out.txt", max_kl=1.0)


@pytest.mark.slow
def test_search_writes_a_recipe_and_goes_on_where_it_stopped(
    tiny_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "recipe.json"
    # One real trial; which of several is taken, the tests above ask.
    int8 = [pair for pair in candidates() if pair[0] == "int8"]
    monkeypatch.setattr("ov_afm.tune.candidates", lambda _: iter(int8))
    monkeypatch.setattr("ov_afm.tune.refinements", lambda _: iter(()))
    words = [str(tiny_fp32), "-o", str(out), "--max-kl", "0.5", "--tokens", "200", "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["trials"]) == 1
    assert all(each["kl_mean"] > 0 for each in first["trials"])
    assert resolve_recipe(str(out)) == Recipe.from_dict(first["chosen"]["recipe"])
    monkeypatch.setattr("ov_afm.tune.compress", lambda *_, **__: pytest.fail("a finished trial was made again"))
    plot = tmp_path / "front.svg"
    assert main([*words, "--plot", str(plot)]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert plot.read_bytes().startswith(b"<?xml")
    assert main([*words[:-1], "--max-kl", "1e-9"]) == 1
    assert capsys.readouterr().err.startswith("ov-afm: error: no recipe tried keeps to the bound; the nearest is int8")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": 3}'])
def test_file_without_a_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="holds no recipe"):
        resolve_recipe(str(path))
