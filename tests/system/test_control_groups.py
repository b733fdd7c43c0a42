"""What control groups allow: read from fake trees of both versions, and from a real group where one can be made."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ov_afm.system import control_groups, resources
from ov_afm.system.control_groups import Memory

NO_LIMIT_V1 = "9223372036854771712"
Tree = Callable[..., Path]


@pytest.fixture
def fake_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Makes a fake /proc and a fake tree of control groups with this process in it; returns the group's folder."""
    monkeypatch.setattr(control_groups, "PROC", tmp_path / "proc")

    def make(kind: str, own: str = "/pod/job", root: str = "/") -> Path:
        place = tmp_path / ("cgroup v2" if kind == "" else kind)
        proc = tmp_path / "proc" / "self"
        proc.mkdir(parents=True, exist_ok=True)
        shown = str(place).replace(" ", "\\040")
        line = f"31 23 0:28 {root} {shown} rw - " + (f"cgroup cgroup rw,{kind}" if kind else "cgroup2 cgroup2 rw")
        with (proc / "mountinfo").open("a") as stream:
            stream.write(f"22 1 0:5 / / rw - ext4 /dev/vda rw\n{line}\n")
        with (proc / "cgroup").open("a") as stream:
            stream.write(f"{'4' if kind else '0'}:{kind}:{own}\n1:pids:/other\n")
        inside = own[len(root) :] if root != "/" and own.startswith(root) else own
        folder = place / inside.lstrip("/")
        if ".." in own:
            folder = place
        folder.mkdir(parents=True)
        return folder

    return make


def write(group: Path, **files: str | int) -> None:
    """Files of a group; `__` in a name stands for a dot."""
    for name, text in files.items():
        (group / name.replace("__", ".")).write_text(f"{text}\n")


def limit_v2(group: Path, maximum: str | int, used: int = 0, cache: int = 0, high: str | int = "max") -> None:
    statistics = f"anon 5\nfile {10 * cache}\nactive_file {cache // 2}\ninactive_file {cache // 2}\nshmem 7"
    write(group, memory__max=maximum, memory__high=high, memory__current=used, memory__stat=statistics)


def limit_v1(group: Path, maximum: str | int, used: int = 0, cache: int = 0, above: str | int = NO_LIMIT_V1) -> None:
    statistics = f"cache 9\ntotal_active_file {cache}\ntotal_inactive_file 0\nhierarchical_memory_limit {above}"
    write(group, memory__limit_in_bytes=maximum, memory__usage_in_bytes=used, memory__stat=statistics)


def test_without_control_groups_nothing_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_groups, "PROC", tmp_path)
    assert (control_groups.memory(), control_groups.cpu_quota(), control_groups.oom_kills()) == (None, None, None)
    assert control_groups.quota_threads() is None


def test_v2_page_cache_is_free_and_tmpfs_is_not(fake_tree: Tree) -> None:
    limit_v2(fake_tree(""), 50_000_000, used=30_000_000, cache=10_000_000)
    assert control_groups.memory() == Memory(50_000_000, 30_000_000)
    assert resources.free_memory() == 30_000_000


def test_v2_tightest_of_nested_groups_counts(fake_tree: Tree) -> None:
    group = fake_tree("")
    limit_v2(group, "max", used=20_000_000)
    limit_v2(group.parent, 40_000_000, used=30_000_000)
    assert control_groups.memory() == Memory(40_000_000, 10_000_000)


def test_v2_high_is_a_limit_because_above_it_everything_stands_still(fake_tree: Tree) -> None:
    limit_v2(fake_tree(""), 50_000_000, used=10_000_000, high=20_000_000)
    assert control_groups.memory() == Memory(20_000_000, 10_000_000)


@pytest.mark.parametrize("used", [5000, 10**12])
def test_group_above_its_limit_has_nothing_left(fake_tree: Tree, used: int) -> None:
    limit_v2(fake_tree(""), 1000, used=used)
    assert control_groups.memory() == Memory(1000, 0)


def test_v1_and_its_way_to_write_no_limit(fake_tree: Tree) -> None:
    group = fake_tree("memory")
    limit_v1(group, NO_LIMIT_V1, used=30_000_000)
    assert control_groups.memory() is None
    assert resources.free_memory() > 50_000_000
    limit_v1(group.parent, 40_000_000, used=30_000_000, cache=5_000_000)
    assert control_groups.memory() == Memory(40_000_000, 15_000_000)


def test_v1_limit_above_what_a_container_sees_counts(fake_tree: Tree) -> None:
    limit_v1(fake_tree("memory", own="/docker/1a2b", root="/docker/1a2b"), NO_LIMIT_V1, used=10, above=1_000)
    assert control_groups.memory() == Memory(1_000, 990)


@pytest.mark.parametrize(
    ("own", "root"),
    [("/kubepods/pod1/c1", "/kubepods/pod1/c1"), ("/", "/"), ("/../../elsewhere", "/"), ("/host/path", "/other")],
    ids=["mounted at its group", "namespace", "outside the namespace", "another's path"],
)
def test_v2_container_finds_its_own_group_at_the_mount(fake_tree: Tree, own: str, root: str) -> None:
    group = fake_tree("", own=own, root=root)
    top = group if own != "/host/path" else group.parents[1]
    limit_v2(top, 1_000)
    assert control_groups.memory() == Memory(1_000, 1_000)


def test_hybrid_memory_of_version_1_and_version_2_mounted_beside_it(fake_tree: Tree) -> None:
    fake_tree("")
    limit_v1(fake_tree("memory"), 2_000)
    assert control_groups.memory() == Memory(2_000, 2_000)


@pytest.mark.parametrize("text", ["", "max\n", "garbage", "\x00\x01", "-5"])
def test_files_that_say_nothing_limit_nothing(fake_tree: Tree, text: str) -> None:
    group = fake_tree("")
    write(group, memory__max=text, memory__current="3", cpu__max=text)
    assert control_groups.cpu_quota() is None
    assert control_groups.memory() is None


def test_refusal_names_the_group_as_what_limits(fake_tree: Tree) -> None:
    limit_v2(fake_tree(""), 4_000_000_000, used=3_000_000_000)
    with pytest.raises(resources.OVAFMError) as caught:
        resources.check_memory(2.5e9, "this model")
    assert caught.value.code == "memory-short"
    assert str(caught.value) == (
        "this model needs about 2.50 GB of memory, 1.00 GB are free of the 4.00 GB that this control group (container) "
        "may have; raise its limit, or close other programs or use a machine with more memory"
    )


def test_v2_quota_is_the_tightest_of_nested_groups(fake_tree: Tree) -> None:
    group = fake_tree("")
    write(group, cpu__max="max 100000")
    assert control_groups.cpu_quota() is None
    write(group.parent, cpu__max="150000 100000")
    assert control_groups.cpu_quota() == 1.5


def test_v1_quota(fake_tree: Tree) -> None:
    group = fake_tree("cpu,cpuacct")
    write(group, cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    assert control_groups.cpu_quota() is None
    write(group, cpu__cfs_quota_us=50_000)
    assert control_groups.cpu_quota() == 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
@pytest.mark.parametrize(("quota", "threads"), [(50_000, 1), (150_000, 2), (400_000, None), (900_000, None)])
def test_threads_follow_the_quota_where_it_is_tighter_than_the_affinity(
    fake_tree: Tree, monkeypatch: pytest.MonkeyPatch, quota: int, threads: int | None
) -> None:
    write(fake_tree(""), cpu__max=f"{quota} 100000")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 4, 5})
    assert control_groups.quota_threads() == threads


def test_kills_are_counted_by_the_own_group_else_by_the_machine(fake_tree: Tree, tmp_path: Path) -> None:
    group = fake_tree("")
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 5\noom_kill 7\n")
    assert control_groups.oom_kills() == 7
    write(group.parent, memory__events="low 0\noom 9\noom_kill 4")
    assert control_groups.oom_kills() == 4
    write(group, memory__events="low 0\noom 3\noom_kill 2")
    assert control_groups.oom_kills() == 2


EAT = """
import sys
from ov_afm.errors import OVAFMError
from ov_afm.system import resources
from ov_afm.system.child_process import run_in_child
from support import supervised
print(resources.free_memory(), flush=True)
for function, argument in ((supervised.crash, 9), (supervised.eat, 500_000_000)):
    try:
        run_in_child(function, argument)
    except OVAFMError as error:
        print(error.code, error, flush=True)
"""


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A new control group below this process's own, with 300 MB of memory."""
    groups = list(control_groups._groups("memory"))
    if not groups:
        pytest.skip("no control groups are mounted here")
    group = groups[0] / "ov_afm_test"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        names = [name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists()]
        if not names:
            pytest.skip("the memory controller is not handed down to new groups here")
        (group / names[0]).write_text("300000000")
        for name in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
            with contextlib.suppress(OSError):
                (group / name).write_text("0" if name == "memory.swap.max" else "300000000")
        yield group
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_real_group_limits_memory_and_its_kill_is_named(real_group: Path) -> None:
    enter = f"import os; open({str(real_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{enter}{EAT}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    if "PermissionError" in done.stderr:
        pytest.skip("this process may not enter a control group")
    free, killed, eaten = done.stdout.splitlines()
    assert 200_000_000 < int(free) < 300_000_000
    assert killed == f"child-died crash: the process was ended by {signal.Signals(9).name}"
    assert eaten.startswith("out-of-memory eat: the process was killed by the system, because memory ran out (this ")
    assert "may have 0.30 GB" in eaten
