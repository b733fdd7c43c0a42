"""The search: what it tries, what it chooses, and that it does not begin anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ov_afm.cli.tune import main
from ov_afm.errors import ConfigError, DeviceError, OVAFMError
from ov_afm.evaluation.recipe_search import Trial, candidates, chosen, front, refinements, tune
from ov_afm.presets import RECIPES, Recipe
from ov_afm.quantization.recipes import resolve_recipe


def trial(label: str, size: int, kl: float, refused: str | None = None) -> Trial:
    return Trial(label, Recipe("tuned", "int4", sym=True, group_size=64), size, kl, 0.9, 1.0, refused)


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


def searched() -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """Both rounds, as if every trial of the first were refined."""
    first = list(candidates())
    second = [pair for label, recipe in first for pair in refinements(Trial(label, recipe))]
    for label, recipe in first + second:
        # A label is one recipe, so that what both rounds have is tried once.
        assert {other for name, other in first + second if name == label} == {recipe}
        assert {name for name, other in first + second if other == recipe} == {label}
    return dict(first), dict(second)


def test_every_recipe_of_the_search_is_a_recipe() -> None:
    first, second = searched()
    assert {recipe.bits for recipe in first.values()} == {4, 8}
    assert any(recipe.gptq for recipe in second.values())
    assert any(recipe.scale_estimation for recipe in second.values())


def test_first_round_holds_the_named_quality_recipes() -> None:
    first, _ = searched()
    fitted = [recipe for recipe in first.values() if recipe.rounding == "fitted"]
    for name in ("int4-quality", "int8-quality"):
        assert replace(RECIPES[name], name="tuned") in fitted
    assert {recipe.group_size for recipe in fitted if recipe.bits == 4} == {128, 64, 32}


def test_second_round_gives_kinds_their_own_formats() -> None:
    _, second = searched()
    base = "int4 g64 + equalise + fitted"
    plain = second[base]
    assert (plain.rounding, plain.equalise, plain.kinds) == ("fitted", "full", ())
    for kind, stored in (("head", "int4"), ("embedding", "int4"), ("attention", "int8"), ("down", "int8")):
        assert second[f"{base}, {kind} {stored}"] == replace(plain, kinds=((kind, stored),))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({}, "bound-missing", "tune needs a bound: add --max-size-gb GB, or --max-kl NATS"),
        ({"max_kl": 0.0}, "bound-not-positive", "the bound of KL divergence must be positive, found 0.0"),
        ({"max_size_gb": -1.0}, "bound-not-positive", "the bound of size must be positive, found -1.0"),
        ({"max_kl": 1.0, "minutes": 0.0}, "bound-not-positive", "the bound of minutes must be positive, found 0.0"),
    ],
)
def test_bad_bounds_are_refused_before_any_work(
    tmp_path: Path, options: dict[str, float], code: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tune("none", tmp_path / "out.json", **options)
    assert (caught.value.code, str(caught.value)) == (code, message)
    assert list(tmp_path.iterdir()) == []


def test_model_that_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OVAFMError):
        tune(tmp_path / "none", tmp_path / "tuned.json", max_size_gb=1)
    assert list(tmp_path.iterdir()) == []


def test_recipe_goes_to_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^the recipe is written to a .json file, found "):
        tune("none", tmp_path / "out.txt", max_kl=1.0)


def test_file_that_is_no_recipe_is_not_overwritten(tiny_fp32: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"architectures": ["ArceeForCausalLM"]}')
    with pytest.raises(ConfigError) as caught:
        tune(tiny_fp32, path, max_kl=1.0)
    assert caught.value.code == "output-foreign"
    assert json.loads(path.read_text()) == {"architectures": ["ArceeForCausalLM"]}


def test_folder_of_the_users_in_the_work_folder_is_kept(tiny_fp32: Path, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError) as caught:
        tune(tiny_fp32, tmp_path / "r.json", max_kl=1.0, work_dir=tmp_path)
    assert caught.value.code == "output-not-ours"
    assert (tmp_path / "trial" / "thesis.txt").read_text() == "years of work"


def test_device_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="there is no device 'TPU'"):
        tune("none", tmp_path / "r.json", max_kl=1.0, device="TPU")


@pytest.mark.slow
def test_search_writes_a_recipe_and_goes_on_where_it_stopped(
    tiny_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "recipe.json"
    # One real trial; which of several is taken, the tests above ask.
    int8 = [pair for pair in candidates() if pair[0] == "int8"]
    monkeypatch.setattr("ov_afm.evaluation.recipe_search.candidates", lambda _: iter(int8))
    monkeypatch.setattr("ov_afm.evaluation.recipe_search.refinements", lambda _: iter(()))
    words = [str(tiny_fp32), "-o", str(out), "--max-kl", "0.5", "--tokens", "200", "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first["trials"]) == 1
    assert all(each["kl_mean"] > 0 for each in first["trials"])
    assert resolve_recipe(str(out)) == Recipe.from_dict(first["chosen"]["recipe"])
    monkeypatch.setattr(
        "ov_afm.evaluation.recipe_search.compress", lambda *_, **__: pytest.fail("a finished trial was made again")
    )
    # A version that recorded fewer fields of a recipe is continued all the same.
    trials = tmp_path / "recipe.tuning" / "trials.jsonl"
    older = json.loads(trials.read_text())
    del older["trial"]["recipe"]["kinds"]
    trials.write_text(json.dumps(older) + "\n")
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
