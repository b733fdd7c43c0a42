"""Models from the Hub: the real client against a Hub on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hub as loopback
from support import tiny

from ov_afm import export
from ov_afm.conversion.sources import resolve
from ov_afm.errors import SourceError
from ov_afm.model_dir import manifest

REPO = "arcee-ai/tiny"
WEIGHTS = "model.safetensors"
BLOCK = 10 * 1024 * 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 24 MB: the client writes a download in blocks of 10 MB."""
    path = tmp_path_factory.mktemp("hub") / "checkpoint"
    tiny.write_arcee(path, hidden_size=512, intermediate_size=2048, head_dim=128, num_hidden_layers=4)
    (path / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- arcee\n---\n# Tiny\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text(tiny.CHAT_TEMPLATE)
    (path / "modeling.py").write_text("raise SystemExit\n")
    (path / "model.gguf").write_text("not wanted")
    return path


@pytest.fixture
def hub() -> Iterator[loopback.Hub]:
    with loopback.serve() as server:
        yield server


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_repository_is_fetched_at_a_pinned_commit(hub: loopback.Hub, checkpoint: Path, tmp_path: Path) -> None:
    repo = hub.add(REPO, checkpoint)
    source = hub.client(tmp_path).run(resolve, REPO, "main")
    assert (source.kind, source.id, source.revision) == ("hub", REPO, repo.sha)
    assert source.license == "apache-2.0"
    assert source.describe()["weights"] == {WEIGHTS: manifest.sha256(checkpoint / WEIGHTS)}
    assert {"LICENSE", "config.json", "tokenizer.json", WEIGHTS} <= names(source.path)
    assert not {"modeling.py", "model.gguf"} & names(source.path)
    assert names(source.path / "additional_chat_templates") == {"tool_use.jinja"}
    assert repo.sha in source.path.parts


@pytest.mark.slow
def test_download_broken_in_passing_goes_on_by_itself(hub: loopback.Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint)
    hub.cut, hub.breaks = {WEIGHTS: 15_000_000}, 1
    source = hub.client(tmp_path).run(resolve, REPO)
    assert source.describe()["weights"] == {WEIGHTS: manifest.sha256(checkpoint / WEIGHTS)}
    assert len(hub.asked(rf"GET .*{WEIGHTS} 206 from {BLOCK}")) == 1


@pytest.mark.slow
def test_download_broken_for_good_is_resumed_by_the_next_run(
    hub: loopback.Hub, checkpoint: Path, tmp_path: Path
) -> None:
    hub.add(REPO, checkpoint)
    size = (checkpoint / WEIGHTS).stat().st_size
    hub.cut, hub.breaks = {WEIGHTS: 15_000_000}, 100
    with pytest.raises(SourceError, match=r"broke off after 10.5 MB of .*run the same command again"):
        hub.client(tmp_path).run(resolve, REPO)
    hub.breaks = 0
    hub.log.clear()
    source = hub.client(tmp_path).run(resolve, REPO)
    assert source.describe()["weights"] == {WEIGHTS: manifest.sha256(checkpoint / WEIGHTS)}
    assert hub.asked(rf"GET .*{WEIGHTS}") == [
        f"GET /{REPO}/resolve/{hub.repos[REPO].sha}/{WEIGHTS} 206 from {BLOCK}, {size - BLOCK} bytes"
    ]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_damaged_download_is_named_and_thrown_away(hub: loopback.Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint)
    hub.corrupt = {WEIGHTS}
    with pytest.raises(SourceError, match=r"^model.safetensors of arcee-ai/tiny is damaged: sha256 .* deleted, run"):
        hub.client(tmp_path).run(resolve, REPO)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1_000_000]
    hub.corrupt = set()
    assert hub.client(tmp_path).run(resolve, REPO).describe()["weights"] == {
        WEIGHTS: manifest.sha256(checkpoint / WEIGHTS)
    }


@pytest.mark.slow
def test_damaged_cache_is_found_without_the_hub(hub: loopback.Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint)
    weights = hub.client(tmp_path).run(resolve, REPO).path / WEIGHTS
    with weights.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    with pytest.raises(SourceError, match="is damaged: sha256"):
        hub.client(tmp_path, HF_HUB_OFFLINE="1").run(resolve, REPO)


@pytest.mark.slow
def test_cached_repository_serves_offline(hub: loopback.Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint)
    online = hub.client(tmp_path).run(resolve, REPO)
    hub.log.clear()
    assert hub.client(tmp_path, HF_HUB_OFFLINE="1").run(resolve, REPO) == online
    assert not hub.log
    assert hub.client(tmp_path, HF_ENDPOINT="http://127.0.0.1:9").run(resolve, REPO) == online


@pytest.mark.slow
def test_tokenizer_alone_in_the_cache_is_no_model(hub: loopback.Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(REPO, checkpoint)
    path = hub.client(tmp_path).run(resolve, REPO).path
    (path / WEIGHTS).unlink()
    with pytest.raises(SourceError, match=r"^arcee-ai/tiny is not in the cache, and HF_HUB_OFFLINE forbids"):
        hub.client(tmp_path, HF_HUB_OFFLINE="1").run(resolve, REPO)


@pytest.mark.parametrize(
    ("options", "env", "code", "message"),
    [
        ({"model": "arcee-ai/nothing"}, {}, "hub-repository-unknown", r"or is private; .*login$"),
        (
            {"model": "arcee-ai/nothing"},
            {"HF_TOKEN": loopback.TOKEN},
            "hub-repository-unknown",
            r"^arcee-ai/nothing is not on http://\S+, or is private",
        ),
        ({"model": REPO}, {"HF_TOKEN": "hf_wrong"}, "hub-refused", r"answered 401 for arcee-ai/tiny; the token was"),
        ({"model": "arcee-ai/gated"}, {}, "hub-gated", r"accept its licence at http://\S+/arcee-ai/gated,"),
        (
            {"model": REPO, "revision": "v9"},
            {},
            "hub-revision-unknown",
            r"^arcee-ai/tiny has no revision 'v9'; its commits: http",
        ),
        (
            {"model": REPO},
            {"HF_HUB_OFFLINE": "1"},
            "hub-offline",
            r"^arcee-ai/tiny is not in the cache, and HF_HUB_OFF",
        ),
        ({"model": REPO}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "hub-unreachable", r"127.0.0.1:9 \(.*HF_ENDPOINT"),
        ({"model": "arcee-ai/pickled"}, {}, "weights-pickled", r"^arcee-ai/pickled has .*\(pytorch_model.bin\)"),
        ({"model": "arcee-ai/ggufs"}, {}, "hub-gguf", r"fetch one and name it: hf download arcee-ai/ggufs a.gguf"),
        ({"model": "arcee-ai/split"}, {}, "hub-gguf", r"arcee-ai/split --include 'q/a-\*-of-00002.gguf' --local-dir"),
        ({"model": "arcee-ai/other"}, {}, "architecture-unsupported", r"^architecture BertModel of arcee-ai/other"),
        ({"model": "arcee-ai/fp8"}, {}, "weights-quantized", r"^weights of arcee-ai/fp8 are .*quant_algo FP8\)"),
        ({"model": "arcee-ai/empty"}, {}, "weights-missing", r"^arcee-ai/empty holds no model"),
        ({"model": "bad--name/x"}, {}, "hub-id-invalid", r"^'bad--name/x' is no Hub id \(.*; give org/name$"),
    ],
    ids=[
        "401-unknown",
        "404-unknown",
        "401-bad-token",
        "403-gated",
        "404-revision",
        "offline-not-cached",
        "refused",
        "pickles",
        "gguf-only",
        "gguf-split",
        "architecture",
        "quantized",
        "empty",
        "no-id",
    ],
)
def test_hub_error_is_one_line_with_advice(
    hub: loopback.Hub,
    tiny_checkpoint: Path,
    tmp_path: Path,
    options: dict[str, str],
    env: dict[str, str],
    code: str,
    message: str,
) -> None:
    hub.add(REPO, tiny_checkpoint)
    hub.add("arcee-ai/gated", tiny_checkpoint, gated=True)
    config = (tiny_checkpoint / "config.json").read_bytes()
    hub.repos["arcee-ai/pickled"] = loopback.Repo({"config.json": config, "pytorch_model.bin": b"\x80"})
    hub.repos["arcee-ai/ggufs"] = loopback.Repo({"README.md": b"", "a.gguf": b"GGUF"})
    hub.repos["arcee-ai/split"] = loopback.Repo({f"q/a-0000{n}-of-00002.gguf": b"GGUF" for n in (1, 2)})
    hub.repos["arcee-ai/empty"] = loopback.Repo({"README.md": b""})
    other = b'{"architectures": ["BertModel"]}'
    quantized = {"config.json": config, "hf_quant_config.json": b'{"quantization": {"quant_algo": "FP8"}}'}
    hub.repos["arcee-ai/fp8"] = loopback.Repo({**quantized, WEIGHTS: b"0" * 99})
    hub.repos["arcee-ai/other"] = loopback.Repo({"config.json": other, WEIGHTS: b"0" * 99})
    with pytest.raises(SourceError, match=message) as raised:
        hub.client(tmp_path, **env).run(resolve, **options)
    assert raised.value.code == code
    assert "\n" not in str(raised.value)
    assert not hub.asked(r"GET .*model\.(safetensors|bin) 200"), "weights were fetched before the refusal"


@pytest.mark.slow
def test_prebuilt_openvino_repository_is_taken_as_it_is(
    hub: loopback.Hub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    prebuilt = tmp_path / "prebuilt"
    prebuilt.mkdir()
    shutil.copy(tiny_checkpoint / "config.json", prebuilt)
    for name in ("openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "openvino_tokenizer.bin"):
        (prebuilt / name).write_bytes(name.encode())
    hub.add("arcee-ai/tiny-ov", prebuilt)
    source = hub.client(tmp_path / "cache").run(resolve, "arcee-ai/tiny-ov")
    assert source.prebuilt
    assert (source.kind, source.revision) == ("openvino", hub.repos["arcee-ai/tiny-ov"].sha)
    assert source.describe()["weights"] == {"openvino_model.bin": manifest.sha256(prebuilt / "openvino_model.bin")}
    assert "openvino_tokenizer.xml" in names(source.path)


@pytest.mark.slow
def test_prebuilt_model_in_the_hubs_own_place_is_taken_whole(
    hub: loopback.Hub, tiny_model: Path, tmp_path: Path
) -> None:
    """The Hub's cache lies in a folder named `.cache`, and its files are links."""
    hub.add("arcee-ai/tiny-ov", tiny_model)
    cache, out = tmp_path / ".cache" / "huggingface", tmp_path / ".cache" / "models" / "tiny"
    child = hub.client(cache, OV_AFM_CACHE=str(tmp_path / ".cache" / "ov_afm"))
    child.run(export, "arcee-ai/tiny-ov", out, verify=False)
    contents = manifest.verify(out, hashes=True)
    assert contents is not None
    assert {path.name for path in tiny_model.iterdir()} == {path.name for path in out.iterdir()}
    assert set(contents.files) == {path.name for path in out.iterdir()} - {manifest.FILE_NAME, manifest.CARD_FILE}
