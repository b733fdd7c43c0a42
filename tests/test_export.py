"""A checkpoint becomes a verified model directory: contents, reruns, replacements, refusals before any work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.in_process import no_children, run_in_process, stamps

from ov_afm.cli.compress import main as compress
from ov_afm.cli.export import main
from ov_afm.conversion import synthetic, tensors
from ov_afm.errors import ConfigError, DeviceError, OVAFMError
from ov_afm.export import export
from ov_afm.model_dir import manifest
from ov_afm.model_dir.geometry import Geometry
from ov_afm.model_dir.manifest import Manifest
from ov_afm.model_dir.model_directory import ModelDirectory, read_config
from ov_afm.presets import Recipe
from ov_afm.quantization.compress_weights import describe_weights
from ov_afm.system import resources

ROOT = Path(__file__).parent.parent


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports that a child process pays for each time are paid once."""
    run_in_process(monkeypatch)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    no_children(monkeypatch)


def recorded(folder: Path) -> Manifest:
    contents = ModelDirectory.open(folder, hashes=True).manifest
    assert contents is not None
    return contents


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def error_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(OVAFMError) as caught:
        export(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- What is in the directory


def test_manifest_tells_source_recipe_versions_files_and_checks(tiny_model: Path, tiny_checkpoint: Path) -> None:
    contents = recorded(tiny_model)
    assert contents.source == {
        "kind": "folder",
        "id": "tiny-arcee",
        "revision": None,
        "license": None,
        "weights": {"model.safetensors": manifest.sha256(tiny_checkpoint / "model.safetensors")},
        "files": {
            path.name: manifest.sha256(path) for path in tiny_checkpoint.iterdir() if path.name != "model.safetensors"
        },
    }
    assert contents.geometry == Geometry.from_config(read_config(tiny_checkpoint))
    assert contents.recipe["name"] == contents.recipe["weight_format"] == "int8"
    assert contents.recipe["layers"] == {"int8_asym per row": 14}
    assert contents.versions == manifest.installed_versions()
    assert all(contents.versions.values())
    assert set(contents.files) == {path.name for path in tiny_model.iterdir()} - {"README.md", manifest.FILE_NAME}


def test_every_check_was_made_and_recorded(tiny_model: Path) -> None:
    checks = recorded(tiny_model).checks
    assert set(checks) == {"weights", "export_parity", "chat_template", "tokenizer", "compression", "golden"}
    assert [prompt["name"] for prompt in checks["golden"]["prompts"]] == ["short", "long"]
    assert checks["weights"] == {"matrices": 14, "on_sampled_rows": 0, "equal": True}
    assert checks["export_parity"]["layers"] == "all"
    assert checks["export_parity"]["tokens"] == 192
    assert checks["export_parity"]["max_logit_diff"] < 1e-3
    assert checks["export_parity"]["top1_agreement"] == 1.0
    assert 0 < checks["compression"]["kl_mean"] < 0.1
    assert checks["compression"]["runtime"] == "f32"


def test_generation_config_recommends_sampling(tiny_model: Path) -> None:
    fields = json.loads((tiny_model / "generation_config.json").read_text())
    wanted = {"do_sample": True, "temperature": 0.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}
    assert {key: fields[key] for key in wanted} == wanted
    assert fields["eos_token_id"] == 2
    generation = recorded(tiny_model).generation
    assert generation["added"] == wanted
    assert generation["stop_tokens"] == [
        {"id": 2, "text": "<|im_end|>", "named_by": ["generation_config", "tokenizer", "chat_template"]}
    ]
    assert generation["notes"] == []


def test_licence_and_tokenizer_travel_byte_for_byte(tiny_model: Path, tiny_checkpoint: Path) -> None:
    for name in ("LICENSE", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tiny_model / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_nothing_in_the_directory_knows_this_machine(tiny_model: Path, tiny_checkpoint: Path) -> None:
    places = {str(tiny_model.parent), str(tiny_checkpoint.parent), str(ROOT), str(Path.home()), sys.prefix}
    for path in tiny_model.iterdir():
        content = path.read_bytes()
        assert not [place for place in places if place.encode() in content], path.name


def test_weights_are_not_mapped_to_fp16_behind_our_back(tiny_model: Path) -> None:
    """The checkpoint is bf16; what is not compressed must stay so."""
    text = (tiny_model / "openvino_model.xml").read_text()
    norms = re.findall(
        r'<layer [^>]*name="self[^"]*layernorm\.weight"[^>]*type="Const"[^>]*>\s*<data element_type="(\w+)"', text
    )
    assert set(norms) <= {"bf16", "f32"}


# -- Formats


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        ("fp32", {"f32": 14}),
        ("fp16", {"f16": 14}),
        (
            Recipe(weight_format="int4", sym=True, group_size=32),
            {"int8_asym per row": 2, "int4_sym g32": 12},
        ),
    ],
    ids=["fp32", "fp16", "int4-g32"],
)
def test_formats_export_and_answer(
    tiny_checkpoint: Path, tmp_path: Path, inline: None, recipe: str | Recipe, layers: dict[str, int]
) -> None:
    import openvino_genai

    made = export(tiny_checkpoint, tmp_path / "model", recipe=recipe)
    assert made.path == tmp_path / "model"
    contents = recorded(made.path)
    assert describe_weights(made.path)["layers"] == layers
    if contents.recipe["weight_format"] == "int4":
        assert contents.recipe["layers"] == layers
    assert contents.recipe["group_size"] == (recipe.group_size if isinstance(recipe, Recipe) else -1)
    loss = contents.checks["compression"]["kl_mean"]
    assert loss < {"fp32": 1e-6, "fp16": 1e-3, "int4": 2.0}[contents.recipe["weight_format"]]
    answer = openvino_genai.LLMPipeline(made.path, "CPU").generate("def", max_new_tokens=3, ignore_eos=True)
    assert isinstance(answer, str)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_command_prints_result_and_names_the_log(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The real command, its child process included, with a synthetic checkpoint."""
    source = synthetic.synth("tiny", tmp_path / "made-up")
    arguments = ["-m", "ov_afm.export", str(source), "-o", str(tmp_path / "out"), "--json"]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    printed = json.loads(result.stdout)
    assert printed["source"]["synthetic"] is True
    assert printed["path"] == str(tmp_path / "out")
    assert printed["notes"][0] == "the weights are random (synthetic checkpoint): speed is real, words are not"
    assert "synthetic checkpoint of random weights" in (tmp_path / "out" / "README.md").read_text()
    again = subprocess.run([sys.executable, *arguments[:-1]], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert again.stderr.splitlines()[0] == (
        f"{tmp_path / 'out'} is this export already; nothing was done (replace it with --force)"
    )
    assert again.stdout.startswith(f"{tmp_path / 'out'}  int8  ")


def test_summary_names_the_log_and_keeps_library_noise_out(
    tiny_checkpoint: Path, tiny_fp32: Path, tmp_path: Path, inline: None, capfd: pytest.CaptureFixture[str]
) -> None:
    prebuilt = copy(tiny_fp32, tmp_path / "made-elsewhere")
    assert main([str(prebuilt), "-o", str(tmp_path / "out"), "--no-verify"]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"^  library messages: .*export-out-\d{8}-\d{6}\.log$", err, re.MULTILINE)
    assert "not verified: asked for with --no-verify" in err
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'out'}  prebuilt  ")


# -- A directory that exists already


def test_rerun_says_so_and_touches_nothing(
    tiny_model: Path, tiny_checkpoint: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(tiny_model)
    assert main([str(tiny_checkpoint), "-o", str(tiny_model)]) == 0
    assert stamps(tiny_model) == before
    out, err = capsys.readouterr()
    assert err.startswith(f"{tiny_model} is this export already; nothing was done (replace it with --force)\n")
    assert "library messages" not in err
    assert out.startswith(f"{tiny_model}  int8  ")


def test_export_that_was_not_verified_does_not_count_as_verified(
    tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path, no_work: None
) -> None:
    existing = copy(tiny_model, tmp_path / "model")
    tiny.edit_json(existing / manifest.FILE_NAME, checks={"skipped": "asked for with --no-verify"})
    assert error_of(tiny_checkpoint, existing) == (
        f"{existing} holds this export, but not verified; verify a new one with --force, or go on with --no-verify"
    )
    assert export(tiny_checkpoint, existing, verify=False).log is None


@pytest.mark.parametrize("change", ["recipe", "weights"])
def test_another_export_is_refused_and_kept(
    tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path, no_work: None, change: str
) -> None:
    before, source = stamps(tiny_model), tiny_checkpoint
    if change == "weights":
        source = copy(tiny_checkpoint, tmp_path / "tiny-arcee")
        content = bytearray((source / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (source / "model.safetensors").write_bytes(content)
    what = {
        "recipe": "its recipe is int8, not int4 (and 3 more differences)",
        "weights": "model.safetensors of its source has changed",
    }
    assert error_of(source, tiny_model, recipe="int4" if change == "recipe" else "int8") == (
        f"{tiny_model} holds another model (tiny-arcee, recipe int8): {what[change]}; "
        "choose another output directory, or replace it with --force"
    )
    assert stamps(tiny_model) == before


def test_damaged_export_is_refused_and_force_is_named(
    tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path, no_work: None
) -> None:
    existing = copy(tiny_model, tmp_path / "model")
    (existing / "openvino_model.bin").write_bytes(b"short")
    message = error_of(tiny_checkpoint, existing)
    assert message.startswith(
        f"{existing} holds a model that cannot be used ({existing / 'openvino_model.bin'} is damaged: "
    )
    assert message.endswith("; replace it with --force")


@pytest.mark.slow
def test_force_replaces_even_the_same_export(
    tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path, inline: None
) -> None:
    existing = copy(tiny_model, tmp_path / "model")
    (existing / "openvino_model.bin").write_bytes(b"short")
    (existing / "vocab.txt").touch()
    made = export(tiny_checkpoint, existing, verify=False, force=True)
    assert made.log is not None
    assert not (existing / "vocab.txt").exists()
    contents = recorded(existing)
    assert contents.checks == {"skipped": "asked for with --no-verify"}
    assert contents.files["openvino_model.bin"] == recorded(tiny_model).files["openvino_model.bin"]


def test_foreign_directory_is_refused_before_any_work(tiny_checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert error_of(tiny_checkpoint, tmp_path / "thesis") == (
        f"{tmp_path / 'thesis'} is not empty; choose another output directory"
    )
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


# -- OpenVINO models made elsewhere


def test_prebuilt_model_is_taken_as_it_is(tiny_fp32: Path, tmp_path: Path, inline: None) -> None:
    made = export(tiny_fp32, tmp_path / "adopted")
    contents = recorded(made.path)
    assert contents.recipe == {"name": "prebuilt", "layers": {"f32": 14}}
    assert contents.source["kind"] == "openvino"
    assert contents.checks["export_parity"] == {"skipped": "made elsewhere; the checkpoint is not at hand"}
    assert contents.checks["tokenizer"]["equal"] is True
    for path in tiny_fp32.iterdir():
        assert (made.path / path.name).read_bytes() == path.read_bytes()
    assert export(tiny_fp32, tmp_path / "adopted").log is None


def test_prebuilt_model_is_not_compressed_behind_a_recipe(tiny_fp32: Path, tmp_path: Path, no_work: None) -> None:
    assert error_of(tiny_fp32, tmp_path / "out", recipe="int4") == (
        "tiny-fp32 is an OpenVINO model already and is taken as it is; leave the recipe out"
    )


def test_prebuilt_model_without_tokenizer_is_refused(tiny_fp32: Path, tmp_path: Path, no_work: None) -> None:
    part = copy(tiny_fp32, tmp_path / "part")
    (part / "openvino_detokenizer.xml").unlink()
    assert error_of(part, tmp_path / "out") == (
        "part is not a whole OpenVINO model: openvino_detokenizer.xml missing; export its source instead"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


# -- Refused before any work


def test_memory_that_cannot_hold_it_is_refused_with_figures(
    tiny_checkpoint: Path, tmp_path: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 500_000_000)
    assert error_of(tiny_checkpoint, tmp_path / "out") == (
        "this export needs about 2.00 GB of memory, 500.0 MB are free; "
        "close other programs or use a machine with more memory"
    )
    assert list(tmp_path.iterdir()) == []


def test_disk_that_cannot_hold_it_is_refused_with_figures(
    tiny_checkpoint: Path, tmp_path: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = error_of(tiny_checkpoint, tmp_path / "out")
    assert re.fullmatch(
        rf"the disk of {re.escape(str(tmp_path))} has 1\.0 kB free, [\d.]+ kB for the uncompressed IR and [\d.]+ kB "
        r"for the model are needed; free some or use another disk",
        message,
    )
    assert list(tmp_path.iterdir()) == []


def test_recipe_that_the_device_cannot_run_is_refused(tiny_checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    with pytest.raises(DeviceError, match="NPU"):
        export(tiny_checkpoint, tmp_path / "out", recipe=Recipe(weight_format="int4", group_size=64), device="NPU")
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipe_lists_those_there_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    message = error_of(tiny_checkpoint, tmp_path / "out", recipe="int3")
    assert message.startswith("recipe 'int3' is unknown; choose one of fp32, fp16, int8, int4")


def test_work_folder_that_cannot_be_written_is_refused(tiny_checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    with pytest.raises(ConfigError, match=r"^cannot write to the work folder .*none \(No such file or directory\)$"):
        export(tiny_checkpoint, tmp_path / "out", work_dir=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["export", "compress"])
def test_no_model_means_afm_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = subprocess.run(
        [sys.executable, "-m", f"ov_afm.{module}"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "arcee-ai/AFM-4.5B" in result.stderr


@pytest.mark.slow
def test_compress_exports_what_is_not_exported_yet(
    tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path, inline: None
) -> None:
    assert compress([str(tiny_checkpoint), "-o", str(tmp_path / "int8")]) == 0
    made = recorded(tmp_path / "int8")
    assert made.files["openvino_model.bin"] == recorded(tiny_model).files["openvino_model.bin"]
    assert made.checks["export_parity"]["top1_agreement"] == 1.0


# -- What the source says holds


def test_weights_that_the_checkpoint_lacks_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = copy(tiny_checkpoint, tmp_path / "source")
    held = load_file(source / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(OVAFMError) as caught:
        tensors.load(source)
    assert str(caught.value) == (
        "source lacks 1 weights, the first is model.layers.1.mlp.up_proj.weight; fetch the checkpoint again"
    )


def test_default_output_is_named_after_model_and_recipe(
    tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(tiny_model, tmp_path / "tiny-arcee-int8")
    monkeypatch.chdir(tmp_path)
    assert export(tiny_checkpoint).path == Path("tiny-arcee-int8")


def test_manifest_of_an_older_version_is_the_same_export(
    tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path, no_work: None
) -> None:
    existing = copy(tiny_model, tmp_path / "model")
    fields = json.loads((existing / manifest.FILE_NAME).read_text())["recipe"]
    assert fields.pop("kinds") == {}
    recipe = Recipe(weight_format="int4", group_size=32)
    older = {key: value for key, value in recipe.recorded().items() if key != "kinds"}
    tiny.edit_json(existing / manifest.FILE_NAME, recipe={**fields, **older})
    assert export(tiny_checkpoint, existing, recipe=recipe).log is None
    other = replace(recipe, kinds=(("head", "int4"),))
    assert "holds another model" in error_of(tiny_checkpoint, existing, recipe=other)


def test_changed_calibration_data_is_another_export(
    tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path, no_work: None
) -> None:
    existing = copy(tiny_model, tmp_path / "model")
    data = tmp_path / "data.txt"
    data.write_text(tiny.CORPUS)
    recipe = Recipe(weight_format="int4", group_size=32, scale_estimation=True, dataset=str(data))
    fields = json.loads((existing / manifest.FILE_NAME).read_text())["recipe"]
    used = {"name": "data.txt", "sha256": manifest.sha256(data), "samples": 1, "tokens": 60}
    tiny.edit_json(existing / manifest.FILE_NAME, recipe={**fields, **recipe.recorded(), "calibration": used})
    assert export(tiny_checkpoint, existing, recipe=recipe).log is None
    data.write_text(tiny.CORPUS * 2)
    assert "holds another model" in error_of(tiny_checkpoint, existing, recipe=recipe)
