"""Upload to a Hub on loopback: whole, visible at once, and not sent twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hub as loopback

from ov_afm.conversion.sources import resolve
from ov_afm.conversion.upload import upload
from ov_afm.errors import SourceError
from ov_afm.model_dir import manifest
from ov_afm.model_dir.geometry import Geometry
from ov_afm.model_dir.model_directory import ModelDirectory, read_config

REPO = "tester/tiny-ov"
LOGIN = {"HF_TOKEN": loopback.TOKEN}


@pytest.fixture
def hub() -> Iterator[loopback.Hub]:
    with loopback.serve() as server:
        yield server


@pytest.fixture
def model_dir(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A directory with the shape of an export; nothing here loads it."""
    path = tmp_path / "model"
    path.mkdir()
    for name in manifest.REQUIRED:
        (path / name).write_bytes(name.encode() * 1000)
    shutil.copy(tiny_checkpoint / "config.json", path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (path / ".lock").write_text("not for others")
    geometry = Geometry.from_config(read_config(path))
    files = {name: entry for name, entry in manifest.scan(path).items() if name != ".lock"}
    manifest.write(path, manifest.Manifest(source={}, geometry=geometry, recipe={}, files=files))
    return path


def test_directory_arrives_whole_with_card_and_manifest(hub: loopback.Hub, model_dir: Path, tmp_path: Path) -> None:
    url = hub.client(tmp_path / "hf", **LOGIN).run(upload, model_dir, REPO, private=True)
    assert url == f"{hub.url}/{REPO}"
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.commits == 1
    assert set(repo.files) == {*manifest.REQUIRED, manifest.FILE_NAME, "README.md"}
    assert all(data == (model_dir / name).read_bytes() for name, data in repo.files.items())


@pytest.mark.slow
def test_interrupted_upload_shows_nothing_and_goes_on_where_it_was(
    hub: loopback.Hub, model_dir: Path, tmp_path: Path
) -> None:
    last = manifest.sha256(model_dir / "openvino_tokenizer.bin")
    hub.cut, hub.breaks = {last: 100}, 1
    with pytest.raises(SourceError, match="run the same command again, what has arrived is not sent twice$"):
        hub.client(tmp_path / "hf", **LOGIN).run(upload, model_dir, REPO)
    assert not hub.repos[REPO].files
    arrived = set(hub.objects)
    assert arrived
    hub.log.clear()
    hub.client(tmp_path / "hf", **LOGIN).run(upload, model_dir, REPO)
    sent = {line.split()[1].removeprefix("/objects/") for line in hub.asked("^PUT")}
    assert sent == {last}
    assert not sent & arrived
    assert hub.repos[REPO].files["openvino_model.bin"] == (model_dir / "openvino_model.bin").read_bytes()


@pytest.mark.slow
def test_uploaded_model_can_be_taken_back(hub: loopback.Hub, model_dir: Path, tmp_path: Path) -> None:
    hub.client(tmp_path / "hf", **LOGIN).run(upload, model_dir, REPO)
    source = hub.client(tmp_path / "other").run(resolve, REPO)
    assert source.prebuilt
    assert ModelDirectory.open(source.path, hashes=True).manifest is not None


def test_damaged_directory_is_not_sent(hub: loopback.Hub, model_dir: Path, tmp_path: Path) -> None:
    damaged = model_dir / "openvino_model.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(SourceError, match="openvino_model.bin is damaged"):
        hub.client(tmp_path / "hf", **LOGIN).run(upload, model_dir, REPO)
    assert not hub.log


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, r"^nobody is logged in to http://\S+; run: hf auth login \(or set HF_TOKEN\)$"),
        ({"HF_TOKEN": "hf_wrong"}, r"answered 401 for tester/tiny-ov; the token was not accepted"),
        ({**LOGIN, "HF_HUB_OFFLINE": "1"}, r"^HF_HUB_OFFLINE is set, and an upload needs the Hub; unset it$"),
    ],
    ids=["no-token", "bad-token", "offline"],
)
def test_upload_that_cannot_be_says_why(
    hub: loopback.Hub, model_dir: Path, tmp_path: Path, env: dict[str, str], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        hub.client(tmp_path / "hf", **env).run(upload, model_dir, REPO)
    assert REPO not in hub.repos


def test_command_prints_one_line_for_a_missing_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ov_afm", "upload", str(tmp_path / "none"), REPO]
    env = {**os.environ, **loopback.environment(tmp_path, "http://127.0.0.1:9"), **LOGIN}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"ov-afm: error: no such model directory: {tmp_path / 'none'}\n"
