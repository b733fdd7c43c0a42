"""A directory appears whole or not at all, whatever happens to the process that makes it."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.system.atomic import disk_full_as_error, replacing, staging, write_json, write_text

HOLDER = """
import sys, time
from pathlib import Path
from ov_afm.system.atomic import staging
with staging(Path(sys.argv[1]), replace=True) as work:
    (work / "half").write_text("half")
    print("inside", flush=True)
    time.sleep(600)
"""
Start = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def holder() -> Iterator[Start]:
    """Starts a process that is in the middle of writing a directory."""
    started: list[subprocess.Popen[str]] = []

    def start(output: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def beside(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def write(output: Path, text: str, *, replace: bool = False) -> None:
    with staging(output, replace=replace) as work:
        (work / "file").write_text(text)


def test_directory_appears_when_the_block_ends_and_nothing_else_stays(tmp_path: Path) -> None:
    output = tmp_path / "new" / "model"
    with staging(output) as work:
        (work / "file").write_text("content")
        assert not output.exists()
    assert (output / "file").read_text() == "content"
    assert beside(output) == ["model"]


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staging(tmp_path / "model") as work:
        (work / "file").write_text("content")
        raise ZeroDivisionError
    assert beside(tmp_path / "model") == []


def test_exception_leaves_the_directory_that_was_to_be_replaced(tmp_path: Path) -> None:
    output = tmp_path / "model"
    write(output, "old")
    with pytest.raises(KeyboardInterrupt), staging(output, replace=True):
        raise KeyboardInterrupt
    assert (output / "file").read_text() == "old"
    assert beside(output) == ["model"]


def test_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", "new")
    assert beside(tmp_path / "model") == ["model"]


def test_foreign_directory_is_refused_and_kept(tmp_path: Path) -> None:
    output = tmp_path / "model"
    write(output, "old")
    with pytest.raises(ConfigError) as caught:
        write(output, "new")
    assert str(caught.value) == (f"{output} is not empty; choose another output directory, or replace it with --force")
    assert (output / "file").read_text() == "old"


def test_replacing_swaps_the_whole_directory(tmp_path: Path) -> None:
    output = tmp_path / "model"
    write(output, "old")
    (output / "only-in-old").touch()
    write(output, "new", replace=True)
    assert [path.name for path in output.iterdir()] == ["file"]
    assert beside(output) == ["model"]


def test_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "model", "old")
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "disk" / "model")
    write(link, "new", replace=True)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "model" / "file").read_text() == "new"
    assert beside(link) == ["disk", "model"]


@pytest.mark.parametrize("name", [".", "..", "home"])
def test_home_and_current_folder_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "project" / "here").mkdir(parents=True)
    (tmp_path / "project" / "here" / "thesis.txt").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").touch()
    monkeypatch.chdir(tmp_path / "project" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    output = tmp_path / "home" if name == "home" else Path(name)
    with pytest.raises(ConfigError, match="holds your home or the current folder and will not be replaced"):
        write(output, "new", replace=True)


def test_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ConfigError) as caught:
        write(tmp_path / "model", "new", replace=True)
    assert str(caught.value) == f"{tmp_path / 'model'} is a file; choose another output directory"
    assert (tmp_path / "model").read_text() == "a file"


def test_parent_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        write(tmp_path / "file" / "model", "new")
    assert str(caught.value) == (f"cannot write to {tmp_path / 'file'} (it is a file); choose another output directory")


def test_folders_made_for_an_output_go_with_it(tmp_path: Path) -> None:
    def fail(output: Path, *others: str) -> None:
        with pytest.raises(KeyError), staging(output):
            for other in others:
                (output.parent / other).touch()
            raise KeyError

    fail(tmp_path / "some" / "where" / "model")
    assert list(tmp_path.iterdir()) == []
    fail(tmp_path / "some" / "where" / "model", "mine.txt")
    assert (tmp_path / "some" / "where" / "mine.txt").exists()


def test_second_writer_is_refused_and_the_first_is_not_disturbed(tmp_path: Path, holder: Start) -> None:
    output = tmp_path / "model"
    first = holder(output)
    with pytest.raises(OVAFMError) as caught:
        write(output, "second", replace=True)
    assert str(caught.value) == (
        f"another process is writing {output}; wait for it, or choose another output directory"
    )
    assert caught.value.code == "output-busy"
    assert first.poll() is None
    assert len([name for name in beside(output) if name.endswith(".partial")]) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_writer_leaves_no_directory_and_the_next_clears_up(tmp_path: Path, holder: Start) -> None:
    output = tmp_path / "model"
    holder(output).send_signal(signal.SIGKILL)
    holder(tmp_path / "other")  # someone else's work in the same folder is not touched
    assert not output.exists()
    write(output, "new")
    assert (output / "file").read_text() == "new"
    left = [name for name in beside(output) if "other" not in name]
    assert left == ["model"]
    assert any(name.startswith(".other.") and name.endswith(".partial") for name in beside(output))


def test_work_of_an_output_whose_name_begins_alike_is_not_touched(tmp_path: Path) -> None:
    with staging(tmp_path / "model.5B") as work:
        (work / "file").write_text("longer")
        write(tmp_path / "model", "shorter")
    assert (tmp_path / "model.5B" / "file").read_text() == "longer"
    assert beside(tmp_path / "model") == ["model", "model.5B"]


def test_directory_that_a_killed_replacement_had_moved_away_comes_back(tmp_path: Path) -> None:
    output = tmp_path / "model"
    write(output, "old")
    output.rename(tmp_path / ".model.ov-afm.old")  # killed between the two renames
    with pytest.raises(ConfigError, match="is not empty"):
        write(output, "new")
    assert (output / "file").read_text() == "old"
    assert beside(output) == ["model"]


def test_remains_of_a_finished_replacement_are_cleared(tmp_path: Path) -> None:
    output = tmp_path / "model"
    write(output, "new")
    write(tmp_path / ".model.ov-afm.old", "old")  # killed before it was deleted
    write(output, "newer", replace=True)
    assert (output / "file").read_text() == "newer"
    assert beside(output) == ["model"]


def test_failed_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "model"
    write(output, "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "open in another program")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        write(output, "new", replace=True)
    assert (output / "file").read_text() == "old"
    assert beside(output) == ["model"]


def test_full_disk_is_one_line_with_the_figure(tmp_path: Path) -> None:
    with pytest.raises(OVAFMError) as caught, disk_full_as_error(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    message = str(caught.value)
    assert message.startswith(f"the disk that holds {tmp_path} is full (")
    assert message.endswith(" MB free); free some space or use another folder")


def test_other_system_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_full_as_error(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_text_is_written_as_given_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old\r\n")
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert beside(path) == ["file.txt"]


def test_json_is_readable_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ü": [\n    1\n  ]\n}\n'
    write_json(tmp_path / "a.json", {"a": 1}, indent=None)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{"a": 1}\n'


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert beside(path) == ["plot.svg"]


def test_writers_in_several_threads_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [letter * 100_000 for letter in "abcd"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda text: write_text(path, text), texts * 20))
    assert path.read_text() in texts
    assert beside(path) == ["file"]
