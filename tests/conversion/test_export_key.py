"""A finished export is the requested one only if nothing that shapes an export has changed."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.in_process import no_children, stamps

from ov_afm import export
from ov_afm.conversion.export_key import differences
from ov_afm.conversion.sources import Source
from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.model_dir import manifest
from ov_afm.model_dir.manifest import Manifest
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.presets import Recipe
from ov_afm.runtime import self_test
from ov_afm.system.child_process import ChildProcess

ANOTHER = "output-is-another-export"


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    no_children(monkeypatch)


def change(path: Path) -> None:
    """Another content that can still be read: white space after JSON and text, another last byte of a weight."""
    content = path.read_bytes()
    end = bytes([content[-1] ^ 1]) if path.suffix == ".safetensors" else content[-1:] + b" "
    path.write_bytes(content[:-1] + end)


def test_every_file_of_the_source_counts(tiny_model: Path, source: Path, no_work: None) -> None:
    before = stamps(tiny_model)
    names = sorted(path.name for path in source.iterdir())
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"} < set(names)
    for name in names:
        original = (source / name).read_bytes()
        change(source / name)
        with pytest.raises(ConfigError, match=f": {name} of its source has changed; ") as caught:
            export(source, tiny_model)
        assert caught.value.code == ANOTHER
        (source / name).write_bytes(original)
        assert export(source, tiny_model).log is None
    assert stamps(tiny_model) == before


@pytest.mark.parametrize(
    "name",
    [
        "added_tokens.json",
        "chat_template.json",
        "hf_quant_config.json",
        "special_tokens_map.json",
        "tokenizer.4.0.json",
        "tokenizer.model",
        "merges.txt",
        "vocab.json",
        "modeling_arcee.py",
        "additional_chat_templates/tools.jinja",
        "NOTICE",
    ],
)
def test_file_that_comes_or_goes_counts(tiny_model: Path, source: Path, no_work: None, name: str) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("{}")
    with pytest.raises(OVAFMError) as caught:
        export(source, tiny_model)
    # What is refused anyway need not be compared.
    assert caught.value.code != ANOTHER or f": its source had no {name}; " in str(caught.value)
    (source / name).unlink()
    assert export(source, tiny_model).log is None
    (source / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match="generation_config.json of its source is not there any more"):
        export(source, tiny_model)


def test_what_shapes_nothing_does_not_count(tiny_model: Path, source: Path, no_work: None) -> None:
    for name in ("README.md", "training_args.bin", "notes.txt", ".gitattributes"):
        (source / name).write_text("words")
    assert export(source, tiny_model).log is None


# Values of each option for an export that exists, and whether they make it another one.
OPTIONS: dict[str, tuple[Any, bool]] = {
    "recipe": ("int4", True),
    "device": ("CPU", False),
    "verify": (False, False),
    "golden": (False, False),
    "kernels": (None, False),
    "allow_pickle": (True, False),
    "trust_remote_code": (True, False),
    "progress": (None, False),
}
# Tested below; or they say what and where; or they belong to the Hub, whose commit is part of the source; or, as for
# `task`, the architecture allows one value alone.
ELSEWHERE = {"model", "output", "adapters", "force", "work_dir", "revision", "task"}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_counts_that_shapes_the_result(
    tiny_model: Path, tiny_checkpoint: Path, no_work: None, option: str
) -> None:
    assert OPTIONS.keys() | ELSEWHERE == inspect.signature(export).parameters.keys()
    value, another = OPTIONS[option]
    if another:
        with pytest.raises(ConfigError, match="holds another model"):
            export(tiny_checkpoint, tiny_model, **{option: value})
    else:
        assert export(tiny_checkpoint, tiny_model, **{option: value}).log is None


RECIPE = Recipe(weight_format="int4", sym=True, group_size=64, ratio=0.9, dataset="packaged")
OTHER: dict[str, Any] = {
    "name": "mine",
    "weight_format": "int8",
    "sym": False,
    "group_size": 32,
    "ratio": 0.8,
    "backup_precision": "int8_sym",
    "all_layers": True,
    "kinds": (("down", "int8"),),
    "group_size_fallback": "ignore",
    "awq": True,
    "scale_estimation": True,
    "gptq": True,
    "equalise": "full",
    "rounding": "fitted",
    "dataset": "self",
    "num_samples": 64,
}


def exported(recipe: Recipe = RECIPE, **source: Any) -> Manifest:
    return Manifest(source, None, recipe.recorded(), versions=manifest.installed_versions())


def test_every_field_of_a_recipe_counts() -> None:
    assert OTHER.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert differences(exported(), {}, RECIPE) == []
    for name, value in OTHER.items():
        base = dataclasses.replace(RECIPE, group_size=-1, ratio=1.0) if name == "weight_format" else RECIPE
        (found,) = differences(exported(base), {}, dataclasses.replace(base, **{name: value}))
        what = {"name": "recipe", "weight_format": "weight format"}.get(name, name.replace("_", " "))
        assert found.startswith(f"its {what} is "), found


def test_every_package_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    existing = exported()
    for package, version in existing.versions.items():
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "installed_versions", lambda p=package: {**existing.versions, p: "99.1"})
            assert differences(existing, {}, RECIPE) == [f"made with {package} {version}, 99.1 is installed"]


def test_adapter_counts_with_its_configuration() -> None:
    adapter = {"name": "lora", "sha256": "a", "config_sha256": "b", "weight": 1.0}
    existing = exported(adapters=[adapter])
    assert differences(existing, {"adapters": [adapter]}, RECIPE) == []
    for key, value in {"sha256": "c", "config_sha256": "c", "weight": 0.5}.items():
        assert differences(existing, {"adapters": [{**adapter, key: value}]}, RECIPE)
    assert differences(existing, {}, RECIPE) == ["its adapters are lora:1, not none as they are now"]


def test_export_of_a_version_that_recorded_less_is_not_taken_for_the_same() -> None:
    source = {"weights": {"a": "1"}}
    assert differences(exported(**source), {**source, "files": {"config.json": "2"}}, RECIPE)


@pytest.mark.slow
def test_what_an_export_lacks_is_added(
    tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChildProcess, "run", lambda self, function, *args: function(*args))
    existing = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    contents = ModelDirectory.open(existing).manifest
    assert contents is not None
    golden = contents.checks.pop("golden")
    manifest.write(existing, contents)
    before = stamps(existing)["openvino_model.bin"]
    monkeypatch.setattr(self_test, "make_golden", lambda folder: golden)
    made = export(tiny_checkpoint, existing, kernels=True)
    assert (existing / "relu2" / "openvino_model.xml").exists()
    assert made.manifest.checks["golden"] == golden
    assert len(made.notes) == 2
    assert ModelDirectory.open(existing, hashes=True).manifest == made.manifest
    assert stamps(existing)["openvino_model.bin"] == before
    assert export(tiny_checkpoint, existing, kernels=True).log is None


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("folder", {"config.json", "tokenizer.json", "LICENSE"}),
        ("openvino", {"config.json", "tokenizer.json", "LICENSE", "notes.txt", "relu2/openvino_model.xml"}),
        ("gguf", {"LICENSE"}),
    ],
)
def test_source_has_the_files_that_shape_what_is_made_of_it(tmp_path: Path, kind: Any, files: set[str]) -> None:
    names = ("config.json", "tokenizer.json", "LICENSE", "notes.txt", "README.md", "ov_afm.json", "model.bin")
    (tmp_path / "relu2").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in (*names, "relu2/openvino_model.xml", ".cache/config.json"):
        (tmp_path / name).write_text(name)
    terms, weights = (tmp_path / "LICENSE",), (tmp_path / "model.bin",)
    source = Source(kind, "x", tmp_path, None, None, terms, weights, {}, False)
    # A folder's `ov_afm.json` says of which model it was made, and may as well count.
    assert set(source.describe()["files"]) - {"ov_afm.json"} == files
    assert set(source.describe()["weights"]) == {"model.bin"}
