"""Children never outlive their gateway: the run record, the reaper, and the reaping at the next start."""

import asyncio
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends.process import groups, marks
from backends.process.reaper_control import ReaperHandle
from backends.process.reaping import reap_orphans, reap_run
from backends.process.run_record import RunRecord, state_dir

PATIENCE = 30.0
RETRY = 10.0
PROMISE = 5.0  # seconds after a gateway's SIGKILL within which nothing of it is left

GATEWAY = """
import asyncio, os, sys
from pathlib import Path
from backends.process.reaper_control import ReaperHandle
from backends.process.output import LineSplitter
from backends.process.child import spawn
from backends.process.run_record import RunRecord

async def main(folder, *codes):
    run_record = RunRecord(Path(folder))
    reaper = ReaperHandle(run_record)
    reaper.start()
    print("reaper", reaper.pid, flush=True)
    for code in codes:
        up = asyncio.Event()
        mark = run_record.intend(backend="m:0", grace=float(os.environ["GRACE"]))
        record = lambda pid, created: run_record.add(mark, pid=pid, create_time=created)
        if "UNRECORDED" in code:
            record = lambda pid, created: None
        await spawn([sys.executable, "-I", "-S", "-c", code], dict(os.environ), record=record, mark=mark,
                    on_line=lambda line: (print(line, flush=True), up.set()), splitter=LineSplitter)
        await up.wait()
    print("ready 0", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""
PRELUDE = "import os, signal\ndef say(name): os.write(1, f'{name} {os.getpid()}\\n'.encode())\n"
MEEK = PRELUDE + "say('child'); signal.pause()"
DEAF = PRELUDE + "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('child')\nwhile True: signal.pause()"
LEADERLESS = PRELUDE + "if os.fork(): os._exit(0)\nsay('child')\nsignal.pause()"
UNRECORDED = MEEK + "  # UNRECORDED"  # as if the gateway was killed between the fork and the record
GROUP = PRELUDE + "if os.fork(): signal.pause()\nos.setpgid(0, 0)\nsay('child')\nsignal.pause()"
SESSION = PRELUDE + "if os.fork(): signal.pause()\nos.setsid()\nsay('child')\nsignal.pause()"
DAEMON = PRELUDE + "if os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\nsay('child')\nsignal.pause()"


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def eventually(what: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@dataclass
class Gateway:
    process: subprocess.Popen[str]
    reaper: int
    children: list[int]

    def kill(self) -> None:
        """As a user does; not waited for, so that it stays a zombie, as under a parent that is busy."""
        self.process.kill()


Start = Callable[..., Gateway]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Gateway] = []

    def gateway(*codes: str, cwd: Path | None = None, grace: float = 0.5) -> Gateway:
        home = str(Path(groups.__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", GATEWAY, str(tmp_path), *codes],
            env=os.environ | {"PYTHONPATH": home, "GRACE": str(grace)},
            cwd=cwd,
            stdout=subprocess.PIPE,
            text=True,
        )
        one = Gateway(process, 0, [])
        started.append(one)
        assert process.stdout is not None
        for line in process.stdout:
            name, _, pid = line.partition(" ")
            if name == "ready":
                return one
            if name == "reaper":
                one.reaper = int(pid)
            else:
                one.children.append(int(pid))
        raise AssertionError("the gateway did not come up")

    yield gateway
    for one in started:
        with one.process:
            one.process.kill()
        for pid in [one.reaper, *one.children]:
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody else's process, the leader of a session as ours are."""
    argv = [sys.executable, "-I", "-S", "-c", MEEK]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def written(folder: Path, record: Any, name: str = "99999999-1.json") -> Path:
    path = folder / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


RUN = "99999999-1-0123abcd"


def dead_gateway(*children: dict[str, object], boot: str | None = None) -> dict[str, object]:
    return {
        "run": RUN,
        "pid": 99999999,
        "create_time": 1.0,
        "boot": groups.boot() if boot is None else boot,
        "children": [{"mark": f"{RUN}.1", "backend": "m:0", "grace": PATIENCE, **child} for child in children],
    }


def identity(pid: int) -> dict[str, object]:
    return {"pid": pid, "create_time": groups.create_time(pid)}


# -- the gateway is killed --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_left_of_a_gateway_that_was_killed(start: Start, tmp_path: Path) -> None:
    gateway = start(MEEK, DEAF, MEEK, LEADERLESS)
    meek, _, stopped, _ = gateway.children
    os.kill(stopped, signal.SIGSTOP)
    assert eventually(lambda: psutil.Process(stopped).status() == psutil.STATUS_STOPPED)
    gateway.kill()
    assert eventually(lambda: not any(map(runs, gateway.children)), PROMISE)
    assert eventually(lambda: not runs(gateway.reaper))
    assert list((tmp_path / "run").iterdir()) == []
    assert not runs(meek)


@pytest.mark.slow
@pytest.mark.parametrize("code", [UNRECORDED, GROUP, SESSION, DAEMON], ids=["unrecorded", "group", "session", "daemon"])
@pytest.mark.parametrize("by", ["reaper", "next start"])
def test_what_the_record_or_the_session_does_not_show_is_found_by_its_mark(
    start: Start, tmp_path: Path, code: str, by: str
) -> None:
    gateway = start(code)
    if by == "next start":
        os.kill(gateway.reaper, signal.SIGKILL)
    gateway.kill()
    assert eventually(lambda: not runs(gateway.process.pid))
    if by == "next start":
        assert all(map(runs, gateway.children))
        assert all(one.gone for one in reap_orphans(tmp_path))
    assert eventually(lambda: not any(map(runs, gateway.children)), PROMISE)
    assert eventually(lambda: not runs(gateway.reaper))


@pytest.mark.slow
def test_the_reaper_gives_each_child_the_grace_of_its_model(start: Start) -> None:
    gateway = start(DEAF, grace=1.5)
    gateway.kill()
    killed_at = time.monotonic()
    assert eventually(lambda: not any(map(runs, gateway.children)), PROMISE)
    assert time.monotonic() - killed_at > 1.4


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="a full disk of our own needs root")
def test_a_full_disk_hides_no_child_from_the_reaper(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "none", tmp_path / "run"], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        gateway = start(MEEK, MEEK)  # the disk holds one page, which the first record takes
        (record,) = (tmp_path / "run").glob("*.json")
        assert len(json.loads(record.read_text())["children"]) < len(gateway.children)
        gateway.kill()
        assert eventually(lambda: not any(map(runs, gateway.children)), PROMISE)
        assert eventually(lambda: not runs(gateway.reaper))
    finally:
        subprocess.run(["umount", "-l", tmp_path / "run"], check=True)


@pytest.mark.slow
def test_the_reaper_is_deaf_to_what_is_meant_for_the_gateway(start: Start) -> None:
    gateway = start(MEEK)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(gateway.reaper, number)
    gateway.kill()
    assert eventually(lambda: not any(map(runs, gateway.children)), PROMISE)


def test_a_stopped_gateway_is_not_taken_for_dead(start: Start, tmp_path: Path) -> None:
    gateway = start(MEEK)
    gateway.process.send_signal(signal.SIGSTOP)
    assert eventually(lambda: psutil.Process(gateway.process.pid).status() == psutil.STATUS_STOPPED)
    assert reap_orphans(tmp_path) == []
    assert all(map(runs, gateway.children))


def test_the_next_start_reaps_when_the_reaper_was_killed_too(start: Start, tmp_path: Path) -> None:
    gateway = start(MEEK, DEAF, LEADERLESS)
    os.kill(gateway.reaper, signal.SIGKILL)
    assert eventually(lambda: not runs(gateway.reaper))
    gateway.kill()
    assert eventually(lambda: not runs(gateway.process.pid))
    assert all(map(runs, gateway.children))
    found = reap_orphans(tmp_path)
    assert [(one.backend, one.killed, one.gone) for one in found] == [
        ("m:0", False, True),
        ("m:0", True, True),
        ("m:0", False, True),
    ]
    assert not any(map(runs, gateway.children))
    assert list((tmp_path / "run").iterdir()) == []
    assert reap_orphans(tmp_path) == []


def test_a_folder_of_the_same_name_does_not_shadow_the_reaper(start: Start, tmp_path: Path) -> None:
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "__init__.py").touch()
    (tmp_path / "backends" / "process.py").write_text("raise SystemExit(3)\n")
    gateway = start(MEEK, cwd=tmp_path)
    gateway.kill()
    assert eventually(lambda: not any(map(runs, gateway.children)))


# -- nobody else is harmed --------------------------------------------------------------------------------------------


def test_a_pid_that_was_used_again_is_left_alone(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    path = written(tmp_path, dead_gateway({"pid": bystander.pid, "create_time": 1.0}))
    assert reap_orphans(tmp_path) == []
    assert bystander.poll() is None
    assert not path.exists()


def test_a_record_from_before_a_reboot_harms_nobody(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    path = written(tmp_path, dead_gateway(identity(bystander.pid), boot="another"))
    assert reap_orphans(tmp_path) == []
    assert bystander.poll() is None
    assert not path.exists()


def test_the_children_of_a_living_gateway_are_left_alone(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    run_record = RunRecord(tmp_path)
    recorded(run_record, bystander.pid)
    assert reap_orphans(tmp_path) == []
    assert bystander.poll() is None
    assert run_record.path.exists()


def test_a_gateway_whose_pid_was_used_again_counts_as_dead(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    record = dead_gateway(identity(bystander.pid)) | {"pid": os.getpid()}
    written(tmp_path, record)
    assert [one.pid for one in reap_orphans(tmp_path)] == [bystander.pid]
    assert bystander.wait() == -signal.SIGTERM


def test_another_group_that_lost_its_leader_is_not_ours() -> None:
    """A shell's background job: its group has no leader any more, but its session is the shell's."""
    code = PRELUDE + "os.setpgid(0, 0)\nif os.fork(): os._exit(0)\nsay('orphan')\nsignal.pause()"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline().split()[1])
        try:
            assert process.wait() == 0
            assert groups.members(process.pid, 1.0) == []
            assert not groups.signal_session(process.pid, 1.0, signal.SIGKILL)
            assert runs(orphan)
        finally:
            os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("number", [1, 0, -1])
def test_a_group_number_that_means_everybody_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="no session"):
        groups.signal_session(number, 1.0, signal.SIGCONT)


def orphaned(bystander_code: str, environ: dict[str, str]) -> tuple[int, int]:
    """A session without its leader: the leader's pid, and the member's."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", bystander_code], stdout=subprocess.PIPE, start_new_session=True, env=environ
    ) as process:
        assert process.stdout is not None
        member = int(process.stdout.readline().split()[1])
        assert process.wait() == 0
    return process.pid, member


@pytest.mark.parametrize("marked", [False, True])
def test_the_next_start_ends_a_session_without_its_leader_only_by_its_mark(tmp_path: Path, marked: bool) -> None:
    """The pid of a child that ended long ago may be used again, for the leader of a session that then loses it."""
    mark = {marks.VARIABLE: f"{RUN}.1"} if marked else {marks.VARIABLE: "7-7-0123abcd.1"}
    leader, member = orphaned(LEADERLESS, dict(os.environ) | mark)
    try:
        path = written(tmp_path, dead_gateway({"pid": leader, "create_time": 2.0}))
        assert [one.pid for one in reap_orphans(tmp_path)] == [member] * marked
        assert runs(member) is not marked
        assert not path.exists()
    finally:
        if runs(member):
            os.kill(member, signal.SIGKILL)


def test_a_search_that_blocks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, where it may take minutes to read a process."""
    free = threading.Event()
    monkeypatch.setattr(psutil.Process, "environ", lambda _: free.wait() and {})
    began, threads = time.monotonic(), threading.active_count()
    for _ in range(3):
        assert marks.find(lambda _: True, since=0.0, within=0.1) == []
    assert time.monotonic() - began < PROMISE
    assert threading.active_count() == threads + 1, "one that blocks is enough"
    free.set()
    monkeypatch.undo()
    assert eventually(lambda: threading.active_count() == threads)


def test_processes_of_others_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(psutil.Process, "environ", lambda one: pytest.fail(f"{one} was read"))
    assert marks.find(lambda _: True, since=0.0) == []


# -- the record -----------------------------------------------------------------------------------------------------

WRONG: list[Any] = [
    "",
    "null",
    "[]",
    "{}",
    "[" * 100_000,
    "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    dead_gateway() | {"children": 5},
    dead_gateway() | {"children": [5]},
    dead_gateway() | {"pid": "12"},
    dead_gateway() | {"create_time": None},
    *(dead_gateway({"pid": pid, "create_time": 1.0}) for pid in (0, 1, -1, True, 2**31, 12.0, "12")),
    dead_gateway({"pid": 99999999, "create_time": "1"}),
    dead_gateway({"pid": 99999999}),
    *(dead_gateway({"pid": None, "grace": grace}) for grace in (-1.0, 1e9, 5, "5", None)),
    dead_gateway() | {"run": 5},
]


@pytest.mark.parametrize("record", WRONG, ids=range(len(WRONG)))
def test_a_record_that_makes_no_sense_is_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, record: Any, bystander: subprocess.Popen[bytes]
) -> None:
    path = written(tmp_path, record, "11-1.json")
    written(tmp_path, dead_gateway(identity(bystander.pid)), "22-1.json")
    assert [one.pid for one in reap_orphans(tmp_path)] == [bystander.pid]  # the others still count
    assert [one.name for one in (tmp_path / "run").iterdir()] == [path.with_suffix(".corrupt").name]
    assert "is not valid" in caplog.text


def test_a_record_cut_short_anywhere_is_moved_aside(tmp_path: Path) -> None:
    whole = json.dumps(dead_gateway({"pid": 99999999, "create_time": 1.0}))
    for size in range(len(whole)):
        path = written(tmp_path, whole[:size])
        assert reap_run(path) == []
        assert not path.exists()
        assert path.with_suffix(".corrupt").read_text() == whole[:size]


def test_no_state_yet(tmp_path: Path) -> None:
    assert reap_orphans(tmp_path / "never") == []
    assert reap_run(tmp_path / "never.json") == []


def recorded(run_record: RunRecord, pid: int, backend: str = "m:0") -> str:
    """The mark."""
    mark = run_record.intend(backend=backend, grace=0.5)
    run_record.add(mark, pid=pid, create_time=groups.create_time(pid) or 5.25)
    return mark


def on_disk(run_record: RunRecord) -> list[dict[str, Any]]:
    children: list[dict[str, Any]] = json.loads(run_record.path.read_text())["children"]
    return children


def test_what_is_written(tmp_path: Path) -> None:
    run_record = RunRecord(tmp_path / "state")
    told: list[bytes] = []
    run_record.tell = told.append
    first = run_record.intend(backend="m:0", grace=20)
    intended = {"mark": first, "backend": "m:0", "grace": 20.0, "pid": None, "create_time": None}
    assert on_disk(run_record) == [intended], "before the spawn"
    run_record.add(first, pid=1234, create_time=5.25)
    second = run_record.intend(backend="m:1", grace=5)
    run_record.add(second, pid=1235, create_time=6.5)
    run_record.remove(first)
    record = json.loads(run_record.path.read_text())
    assert (record["pid"], record["create_time"]) == (os.getpid(), groups.create_time(os.getpid()))
    assert record["children"] == [
        {"mark": second, "backend": "m:1", "grace": 5.0, "pid": 1235, "create_time": 6.5},
    ]
    assert json.loads(told[0])["children"] == [intended]
    assert json.loads(told[-1]) == record
    assert stat.S_IMODE(run_record.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(run_record.path.parent.stat().st_mode) == 0o700
    assert list(run_record.path.parent.iterdir()) == [run_record.path]
    run_record.close()
    run_record.remove(second)
    assert list(run_record.path.parent.iterdir()) == []


def test_a_disk_that_fails_later_does_not_stop_the_gateway(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_record = RunRecord(tmp_path)
    told: list[bytes] = []
    run_record.tell = told.append
    run_record.path.with_suffix(".tmp").mkdir()
    recorded(run_record, 2**22 + 1)
    assert "children not recorded" in caplog.text
    assert [one["pid"] for one in json.loads(told[-1])["children"]] == [2**22 + 1], "the reaper knows it"
    run_record.path.with_suffix(".tmp").rmdir()
    recorded(run_record, 2**22 + 2)
    assert [one["pid"] for one in on_disk(run_record)] == [2**22 + 1, 2**22 + 2]
    run_record.close()


def test_a_disk_that_fails_at_once_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        RunRecord(tmp_path / "file")


def test_state_dir(tmp_path: Path) -> None:
    assert state_dir({"MLX_GATEWAY_STATE_DIR": str(tmp_path)}) == tmp_path
    assert state_dir({"MLX_GATEWAY_STATE_DIR": ""}).name == "mlx-gateway"
    assert state_dir({}).is_absolute()


# -- the gateway's side -----------------------------------------------------------------------------------------------


def test_a_clean_end(tmp_path: Path) -> None:
    run_record = RunRecord(tmp_path)
    reaper = ReaperHandle(run_record)
    reaper.start()
    pid = reaper.pid
    assert pid is not None
    assert runs(pid)
    assert os.getsid(pid) == pid
    run_record.close()
    asyncio.run(reaper.close())
    assert not psutil.pid_exists(pid)
    assert reaper.pid is None
    asyncio.run(reaper.close())  # again is fine


def test_it_is_started_again_when_it_dies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_record = RunRecord(tmp_path)
    reaper = ReaperHandle(run_record, retry=RETRY)
    reaper.start()
    assert not reaper.check(0.0)
    for now in (1.0, 1.0 + RETRY):
        before = reaper.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        assert eventually(lambda pid=before: not runs(pid))  # type: ignore[misc]
        assert eventually(lambda at=now: reaper.check(at))  # type: ignore[misc]
        assert reaper.pid != before
        assert not reaper.check(now)
    after = reaper.pid
    assert after is not None
    os.kill(after, signal.SIGKILL)
    assert eventually(lambda: not runs(after))
    assert not reaper.check(2.0 + RETRY)  # one that will not live is not started at every tick
    assert caplog.records[-1].__dict__["status"] == -9
    run_record.close()
    asyncio.run(reaper.close())


def test_no_process_to_be_had_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    reaper = ReaperHandle(RunRecord(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert not reaper.check(0.0)
    assert "children may outlive a killed gateway" in caplog.text
    with pytest.raises(FileNotFoundError):
        reaper.start()


def test_letting_go_with_children_left_ends_them(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    run_record = RunRecord(tmp_path)
    recorded(run_record, bystander.pid)
    reaper = ReaperHandle(run_record)
    reaper.start()
    asyncio.run(reaper.close())
    assert bystander.wait() == -signal.SIGTERM
    assert not run_record.path.exists()


def test_a_record_with_a_live_child_outlives_a_clean_end(
    tmp_path: Path, bystander: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    run_record = RunRecord(tmp_path)
    recorded(run_record, bystander.pid)
    recorded(run_record, 2**22 + 1, "m:1")
    assert [child.pid for child in run_record.close()] == [bystander.pid]
    assert [child["pid"] for child in json.loads(run_record.path.read_text())["children"]] == [bystander.pid]
    assert caplog.records[-1].__dict__["pid"] == bystander.pid
    recorded(run_record, 2**22 + 2, "m:2")
    assert "m:2" not in run_record.path.read_text(), "it is closed"
    assert [one.gone for one in reap_run(run_record.path)] == [True]
    assert not run_record.path.exists()


def test_many_threads_may_change_the_record(tmp_path: Path) -> None:
    run_record = RunRecord(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        for pid in range(1000, 1064):
            threads.submit(recorded, run_record, pid)
    written = json.loads(run_record.path.read_text())["children"]
    assert sorted(child["pid"] for child in written) == list(range(1000, 1064))
    run_record.close()


def test_a_reaper_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    reaper = ReaperHandle(RunRecord(tmp_path), exit_margin=0.1)
    reaper.start()
    pid = reaper.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    asyncio.run(reaper.close())
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError], ids=["gone", "macOS: only zombies"])
def test_a_session_that_takes_no_signal_has_got_none(
    monkeypatch: pytest.MonkeyPatch, bystander: subprocess.Popen[bytes], error: type[OSError]
) -> None:
    created = groups.create_time(bystander.pid)
    assert created is not None
    assert groups.members(bystander.pid, created) == [bystander.pid]

    def refuse(group: int, number: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", refuse)
        patched.setattr(os, "kill", refuse)
        assert not groups.terminate_session(bystander.pid, created)
        assert not groups.signal_process(bystander.pid, created, signal.SIGTERM)
