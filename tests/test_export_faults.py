"""Whatever goes wrong while a model is made: one line, the right status, and nothing left beside the output."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support import tiny

from ov_afm import compress, export
from ov_afm.conversion import convert
from ov_afm.errors import ConfigError, ExtensionError, OVAFMError, SourceError
from ov_afm.model_dir import manifest
from ov_afm.presets import RECIPES
from ov_afm.pruning.prune import prune

HERE = Path(__file__).parent / "support"
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python processes and ends them with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(HERE)},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str], within_s: float = 120) -> None:
    end = time.monotonic() + within_s
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, f"process {pid} is still there"
            time.sleep(0.05)


# -- Interrupted and killed


@posix
@pytest.mark.parametrize(
    ("phase", "with_work_dir"),
    [*((phase, False) for phase in (*convert.STEPS, "hashing")), ("converting", True)],
    ids=[*convert.STEPS, "hashing", "with-work-dir"],
)
def test_interrupt_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, start: Start, phase: str, with_work_dir: bool
) -> None:
    output, ready, work = tmp_path / "models" / "out", tmp_path / "ready", tmp_path / "work"
    work.mkdir()
    options = ["--work-dir", work] if with_work_dir else []
    process = start(HERE / "slow_export.py", phase, ready, tiny_checkpoint, "-o", output, *options)
    wait_for(ready.exists, process)
    if phase != "hashing":
        assert any(output.parent.glob(".out.*.partial/*.bin"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "ov-afm: interrupted\n")
    assert not output.parent.exists()
    assert list(work.iterdir()) == []
    if phase != "hashing":
        wait_until_gone(int(ready.read_text()))


@posix
def test_kill_leaves_no_model_and_no_process(tiny_checkpoint: Path, tmp_path: Path, start: Start) -> None:
    output, ready = tmp_path / "models" / "out", tmp_path / "ready"
    process = start(HERE / "slow_export.py", "compressing", ready, tiny_checkpoint, "-o", output)
    wait_for(ready.exists, process)
    process.kill()
    process.wait(10)
    wait_until_gone(int(ready.read_text()))
    assert not output.exists()


@posix
@pytest.mark.slow
def test_killed_export_is_cleared_and_made_by_the_next_and_two_at_once_do_not_mix(
    tiny_checkpoint: Path, tmp_path: Path, start: Start
) -> None:
    """The real command throughout: killed in the middle, then run twice at once."""
    output = tmp_path / "out"
    arguments = ["-m", "ov_afm.export", tiny_checkpoint, "-o", output]
    killed = start(*arguments)
    wait_for(lambda: any(tmp_path.glob(".out.*.partial/openvino_tokenizer.xml")), killed)
    killed.kill()
    killed.wait(10)
    assert not output.exists()
    left = list(tmp_path.glob(".out.*.partial"))
    assert len(left) == 1

    first = start(*arguments)
    wait_for(lambda: not left[0].exists() and any(tmp_path.glob(".out.*.partial")), first)
    second = start(*arguments)
    _, refused = second.communicate(timeout=60)
    assert second.returncode == 1
    assert refused == (
        f"ov-afm: error: another process is writing {output}; wait for it, or choose another output directory\n"
    )
    _, messages = first.communicate(timeout=400)
    assert first.returncode == 0, messages
    assert manifest.verify(output, hashes=True) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- Bad input: refused in a moment, by the real command


def refused(start: Start, *arguments: object) -> str:
    process = start("-m", "ov_afm.export", *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("ov-afm: error: ")
    return err.removeprefix("ov-afm: error: ").rstrip("\n")


def break_checkpoint(kind: str, folder: Path) -> str:
    """Damage a checkpoint; returns a pattern of the error."""
    if kind == "no-config":
        (folder / "config.json").unlink()
        return f"{re.escape(str(folder))} is no checkpoint: config.json is missing; .*"
    if kind == "architecture":
        tiny.edit_json(folder / "config.json", architectures=["MambaForCausalLM"])
        return "architecture MambaForCausalLM of .* is not supported; supported are ArceeForCausalLM, .*"
    if kind == "tokenizer":
        (folder / "tokenizer.json").unlink()
        return f"no tokenizer in {re.escape(str(folder))}: tokenizer.json is missing; .*"
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    return f"{re.escape(str(folder / 'model.safetensors'))} is damaged or cut short .*; fetch it again"


@pytest.mark.parametrize("kind", ["no-config", "architecture", "tokenizer", "corrupt-safetensors"])
def test_broken_checkpoint_is_one_line(tiny_checkpoint: Path, tmp_path: Path, start: Start, kind: str) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    pattern = break_checkpoint(kind, source)
    assert re.fullmatch(pattern, refused(start, source, "-o", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_path_is_one_line(tmp_path: Path, start: Start) -> None:
    missing = tmp_path / "none"
    assert refused(start, missing, "-o", tmp_path / "out") == f"no such file or folder: {missing}"


def test_output_that_is_a_file_is_one_line(tiny_checkpoint: Path, tmp_path: Path, start: Start) -> None:
    (tmp_path / "out").write_text("mine")
    assert refused(start, tiny_checkpoint, "-o", tmp_path / "out", "--force") == (
        f"{tmp_path / 'out'} is a file; choose another output directory"
    )
    assert (tmp_path / "out").read_text() == "mine"


def test_cache_that_cannot_be_written_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "file"))
    assert refused(start, tiny_checkpoint, "-o", tmp_path / "out") == (
        f"cannot write logs to {tmp_path / 'file' / 'logs'} (Not a directory); "
        "set OV_AFM_CACHE to a folder that can be written"
    )


def test_tokenizer_that_is_no_tokenizer_is_one_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(OVAFMError) as caught:
        convert.write_tokenizer(source, tmp_path)
    assert caught.value.code == "tokenizer-not-converted"


# -- Disks


@contextlib.contextmanager
def small_disk(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    mount = shutil.which("mount")
    if mount is None or sys.platform != "linux":
        pytest.skip("needs a Linux mount to make a small disk")
    if subprocess.run([mount, "-t", "tmpfs", "-o", options, "none", path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield path
    finally:
        # A native library may still map a file of it.
        subprocess.run(["umount", "-l", path], check=True)


def test_disk_too_small_for_the_estimate_is_refused_with_figures(
    tiny_checkpoint: Path, tmp_path: Path, start: Start
) -> None:
    with small_disk(tmp_path / "disk", "size=100k") as disk:
        message = refused(start, tiny_checkpoint, "-o", disk / "out")
        assert re.fullmatch(
            rf"the disk of {disk} has [\d.]+ kB free, .* are needed; free some or use another disk", message
        )
        assert list(disk.iterdir()) == []


def test_read_only_disk_is_one_line(tiny_checkpoint: Path, tmp_path: Path, start: Start) -> None:
    with small_disk(tmp_path / "disk", "size=100k,ro") as disk:
        assert refused(start, tiny_checkpoint, "-o", disk / "out") == (
            f"cannot write to {disk} (Read-only file system); choose another output directory"
        )


@pytest.mark.slow
@pytest.mark.parametrize("full", ["output", "work folder"])
def test_disk_that_fills_up_is_one_line(tiny_checkpoint: Path, tmp_path: Path, full: str) -> None:
    """Native writers give up with messages of their own, or none."""
    with small_disk(tmp_path / "disk", "size=150k") as disk:
        out, work = (disk, tmp_path / "other") if full == "output" else (tmp_path / "other", disk)
        (tmp_path / "other").mkdir()
        with pytest.raises(OVAFMError) as caught:
            convert.build(convert.Job(tiny_checkpoint, out, work, RECIPES["int8"], prove=False))
        message = str(caught.value)
        assert message == f"the disk that holds {disk} is full (0 MB free); free some space or use another folder"


# -- The user's files, and results that are whole


def saved(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("output", ["ck", ".", "adapter-holder", "docs", "new/../ck", "link"])
def test_output_that_would_cost_the_user_something_is_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = tmp_path / "all"
    shutil.copytree(tiny_checkpoint, everything / "ck")
    (everything / "new").mkdir()
    (everything / "docs").mkdir()
    (everything / "docs" / "thesis.txt").write_text("years of work")
    (everything / "adapter-holder").mkdir()
    (everything / "adapter-holder" / "text.txt").write_text("calibration")
    (everything / "link").symlink_to("ck")
    monkeypatch.setattr(sys.modules["ov_afm.export"], "resolve", lambda *_, **__: pytest.fail("work began"))
    before = saved(everything)
    recipe = replace(RECIPES["int4"], dataset=str(everything / "adapter-holder" / "text.txt"))
    with pytest.raises(ConfigError) as caught:
        export(everything / "ck", everything / output, recipe=recipe, force=True)
    assert caught.value.code in ("output-is-input", "output-holds-input", "output-not-ours")
    assert saved(everything) == before


@pytest.mark.parametrize("verb", ["compress", "prune"])
def test_other_commands_do_not_replace_what_they_read(
    verb: str, tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_model if verb == "compress" else tiny_checkpoint, tmp_path / "source"))
    before = saved(tmp_path)
    with pytest.raises(ConfigError) as caught:
        if verb == "compress":
            compress(source, source, force=True)
        else:
            prune(source, source, target_params="100K", force=True)
    assert caught.value.code == "output-is-input"
    assert saved(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "recipe", "code"),
    [({"hidden_act": "silu"}, "int8", "kernels-not-relu2"), ({}, "fp32", "kernels-need-quantized")],
    ids=["llama", "uncompressed"],
)
def test_kernels_that_cannot_be_used_are_refused_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, config: dict[str, str], recipe: str, code: str
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    tiny.edit_json(source / "config.json", **config)
    with pytest.raises(ConfigError) as caught:
        export(source, tmp_path / "out", recipe=recipe, kernels=True)
    assert caught.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.slow
def test_finished_export_stays_where_packing_fails(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ExtensionError("no MLP can use the kernels", code="kernels-unsupported")

    monkeypatch.setattr(sys.modules["ov_afm.export"], "pack", fail)
    monkeypatch.setattr("ov_afm.kernels.extension.load", lambda: Path())
    out = tmp_path / "out"
    with pytest.raises(ExtensionError, match=rf"^{out} is exported and whole, but not packed .*no MLP can") as caught:
        export(tiny_checkpoint, out, verify=False, kernels=True)
    assert caught.value.code == "kernels-unsupported"
    assert manifest.verify(out, hashes=True) is not None


def test_damaged_model_is_not_adopted_as_if_it_were_right(tiny_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_model, tmp_path / ".cache" / "source"))
    weights = source / manifest.MODEL_BIN
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(SourceError, match="its sha256 is not the one recorded"):
        export(source, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
