"""What is the user's is never replaced; what is ours, only on request and only when the new one is complete."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ov_afm.errors import ConfigError
from ov_afm.model_dir import manifest, outputs
from ov_afm.model_dir.outputs import new_folder

RECIPE = b'{"recipe": {}, "found_by": {}}'


def model(path: Path, *, with_manifest: bool = True) -> Path:
    """A folder with the shape of a model directory; nothing here loads it."""
    path.mkdir(parents=True)
    for name in manifest.REQUIRED:
        (path / name).write_text(name)
    (path / "tokenizer.json").write_text("{}")
    if with_manifest:
        source = {"kind": "folder", "id": "x"}
        files = manifest.scan(path)
        manifest.write(path, manifest.Manifest(source=source, geometry=None, recipe={"name": "int8"}, files=files))
        (path / "README.md").write_text("my words\n")
    return path


def checkpoint(path: Path, **config: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["ArceeForCausalLM"], **config}))
    (path / "model.safetensors").write_text("weights")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(output: Path, *, force: bool = True, inputs: tuple[Path, ...] = ()) -> None:
    with new_folder(output, force=force, inputs=inputs) as work:
        (work / "new").touch()


def refused(output: Path, code: str, **options: Any) -> str:
    """Check that nothing below the test's folder changes; returns the message."""
    root = output.parent if output.parent.exists() else output
    before = tree(root)
    with pytest.raises(ConfigError) as caught:
        write(output, **options)
    assert tree(root) == before
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_model_directory_is_replaced_on_request_only(tmp_path: Path, with_manifest: bool) -> None:
    output = model(tmp_path / "model", with_manifest=with_manifest)
    assert refused(output, "output-not-empty", force=False).endswith(", or replace it with --force")
    write(output)
    assert set(tree(tmp_path)) == {"model/new"}


def damaged(path: Path) -> None:
    (path / manifest.FILE_NAME).write_text("{")
    (path / "openvino_model.bin").unlink()


def packed(path: Path) -> None:
    (path / "relu2").mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin", "config.json", "LICENSE"):
        (path / "relu2" / name).touch()


def downloaded(path: Path) -> None:
    (path / ".cache" / "huggingface").mkdir(parents=True)
    (path / ".cache" / "huggingface" / "x.lock").touch()
    (path / ".DS_Store").touch()


def templated(path: Path) -> None:
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").touch()


def served(path: Path) -> None:
    (path / "graph.pbtxt").touch()


@pytest.mark.parametrize(
    "change", [damaged, packed, downloaded, templated, served], ids=lambda change: str(change.__name__)
)
def test_what_we_and_other_programs_leave_in_a_model_directory_goes_with_it(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    change(model(tmp_path / "model"))
    write(tmp_path / "model")
    assert set(tree(tmp_path)) == {"model/new"}


@pytest.mark.parametrize("mark", [outputs.PRUNED_FILE, outputs.SYNTHETIC_KEY])
def test_checkpoint_of_prune_or_synth_is_replaced_and_others_are_not(tmp_path: Path, mark: str) -> None:
    ours = checkpoint(tmp_path / "ours", **({mark: True} if mark == outputs.SYNTHETIC_KEY else {}))
    if mark == outputs.PRUNED_FILE:
        (ours / mark).write_text("{}")
    write(ours)
    assert [path.name for path in ours.iterdir()] == ["new"]
    refused(checkpoint(tmp_path / "fetched"), "output-not-ours")


@pytest.mark.parametrize(
    "name",
    [
        "thesis.txt",
        "model.safetensors",
        "optimizer.pt",
        "adapter/adapter_model.safetensors",
        "data.jsonl",
        ".git/config",
        "relu2/notes.txt",
        "relu2/more/openvino_model.xml",
        "models/openvino_model.xml",
    ],
)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_model_directory_in_which_something_else_lies_is_kept(tmp_path: Path, name: str, with_manifest: bool) -> None:
    output = model(tmp_path / "model", with_manifest=with_manifest)
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("years of work")
    message = refused(output, "output-holds-other")
    assert f" holds {Path(name).parts[0]}" in message


def test_folder_of_the_users_is_kept_and_force_is_not_advised(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("years of work")
    refused(tmp_path / "docs", "output-not-ours")
    assert "--force" not in refused(tmp_path / "docs", "output-not-empty", force=False)


def test_folder_that_holds_models_is_no_model(tmp_path: Path) -> None:
    model(tmp_path / "all" / "model")
    refused(tmp_path / "all", "output-not-ours")


@pytest.mark.parametrize("way", ["{0}", "{0}/.", "{0}/../{1}", "{0}/relu2/..", "link", "link/../{1}", "linked/{1}"])
def test_input_is_recognised_however_its_name_is_written(tmp_path: Path, way: str) -> None:
    source = model(tmp_path / "all" / "ck")
    packed(source)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "linked").symlink_to(tmp_path / "all")
    output = tmp_path / way.format("all/ck", "ck") if "link/.." not in way else tmp_path / "linked" / "ck"
    before = tree(tmp_path / "all")
    for one, other in ((output, source), (source, output)):
        with pytest.raises(ConfigError) as caught:
            write(one, inputs=(other,))
        assert caught.value.code == "output-is-input"
    assert tree(tmp_path / "all") == before


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs another name for a folder")
def test_input_is_recognised_by_identity_not_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that ignores the case of letters, or below a bind mount."""
    source = model(tmp_path / "ck")
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: self.absolute())
    other_name = Path(f"/proc/{os.getpid()}/root{source}")
    with pytest.raises(ConfigError) as caught:
        write(other_name, inputs=(source,))
    assert caught.value.code == "output-is-input"


def test_output_that_holds_an_input_is_refused_whatever_the_input_is(tmp_path: Path) -> None:
    output = model(tmp_path / "out")
    elsewhere = checkpoint(tmp_path / "elsewhere")
    (output / "relu2").mkdir()
    for name in ("adapter", "data.jsonl", "relu2/model.gguf"):
        (output / name).write_text("x")
        refused(output, "output-holds-input", inputs=(output / name,))
        (output / name).unlink()
    (output / "link").symlink_to(elsewhere)
    refused(output, "output-holds-input", inputs=(output / "link",))
    (output / "link").unlink()
    assert elsewhere.exists()


def test_output_may_lie_in_a_checkpoint_but_not_in_a_model_directory(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "ck")
    write(source / "ov", inputs=(source,))
    assert (source / "model.safetensors").exists()
    refused(model(tmp_path / "model") / "int8", "output-in-input", inputs=(tmp_path / "model",))


def test_names_that_are_no_path_are_no_inputs(tmp_path: Path) -> None:
    write(tmp_path / "out", inputs=(Path("arcee-ai/AFM-4.5B"), Path("a" * 5000), Path("nul\0l")))
    assert (tmp_path / "out" / "new").exists()


@pytest.mark.parametrize("name", ["hub", "hub/models--a--b/snapshots/0123", "home", "cache", "cache/compiled/x"])
def test_caches_are_no_place_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    output = tmp_path / name if not name.startswith("hub") else tmp_path / "home" / name
    model(tmp_path / "home" / "hub" / "models--a--b" / "snapshots" / "0123")
    refused(output, "output-is-cache")


def test_folder_of_results_may_lie_beside_what_a_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    write(tmp_path / "models" / "int8")
    assert (tmp_path / "models" / "int8" / "new").exists()


def test_what_appears_in_the_output_meanwhile_is_kept(tmp_path: Path) -> None:
    for output, code in ((tmp_path / "new", "output-not-empty"), (model(tmp_path / "old"), "output-holds-other")):
        with pytest.raises(ConfigError) as caught, new_folder(output, force=output.exists()) as work:
            (work / "new").touch()
            output.mkdir(exist_ok=True)
            (output / "thesis.txt").write_text("years of work")
        assert caught.value.code == code
        assert (output / "thesis.txt").read_text() == "years of work"


def test_hidden_neighbours_of_other_programs_are_kept(tmp_path: Path) -> None:
    """Names that only look like ours."""
    neighbours = [".model.old", ".model.1.partial", ".model.lock"]
    for name in neighbours:
        (tmp_path / name).write_text("mine")
    write(model(tmp_path / "model"))
    assert {name: (tmp_path / name).read_text() for name in neighbours} == dict.fromkeys(neighbours, "mine")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_circle_of_links_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ConfigError, match="cannot be followed"):
        write(tmp_path / "circle" / "model")


def test_dangling_link_is_followed_to_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    write(tmp_path / "link")
    assert (tmp_path / "nowhere" / "new").exists()
    assert (tmp_path / "link").is_symlink()


def test_file_is_overwritten_only_if_it_is_such_a_result(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def check(content: bytes | None) -> None:
        if content is not None:
            path.write_bytes(content)
        outputs.check_file(path, ours=lambda data: data == RECIPE, what="a recipe of ov-afm tune")

    for content in (None, b"", RECIPE):
        check(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path} exists and is not a recipe of ov-afm tune")):
        check(b'{"architectures": []}')
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        outputs.check_file(tmp_path, ours=lambda _: True, what="a recipe of ov-afm tune")
