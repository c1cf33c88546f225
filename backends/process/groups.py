"""The processes of a child: the members of its session, and signals to all of them.

Every child leads its own session, so its pid is also its process group id and its session id. A member may have a
process group of its own (a shell's job): so the session counts, not the group. A pid alone is never trusted: pids are
reused, and a recorded one may be days old. So a process is identified by (pid, create_time), where create_time is only
ever compared, and on Linux is meaningful only together with ``boot()``.

Caveat: a session may outlive its leader (``sh -c "server & wait"``), and while it does, no kernel gives its id to a new
process. So if another process has the leader's pid, the session has ended. If no process has it, the members of the
session of that id are ours only if somebody has watched it since: after that, an id may have been used again for a
session that has lost its leader too. ``leads`` tells the two apart.

Works per pid, without reading command lines: on macOS that can block for minutes on protected processes.
"""

import os
from pathlib import Path
from signal import Signals

import psutil

KILL_WAIT = 2.0  # seconds of repeated SIGKILL, which whoever ends a session allows
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot() -> str:
    """Id of this boot on Linux, where psutil counts from boot; "" on macOS, where create times are dates."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def create_time(pid: int) -> float | None:
    """None if there is no such process. A zombie may have one.

    The value by which psutil itself compares processes. psutil's ``create_time()`` is not usable: on Linux always, on
    macOS since 7.1, it changes when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        return float(getattr(process, "_ident", (pid, None))[1] or process.create_time())
    except psutil.Error:
        return None


def is_running(pid: int, created: float) -> bool:
    """True: exactly this process runs. False for a zombie."""
    return create_time(pid) == created and not _is_zombie(pid)


def leads(leader: int, created: float) -> bool:
    """The child itself still exists, if only as a zombie."""
    return create_time(leader) == created


def members(leader: int, created: float) -> list[int]:
    """The running processes of the session that (leader, created) leads, or led."""
    if leader <= 1:
        raise ValueError(f"{leader} is no session that may be signalled")
    if create_time(leader) not in {None, created}:
        return []
    return [pid for pid in psutil.pids() if pid > 1 and session(pid) == leader and not _is_zombie(pid)]


def signal_session(leader: int, created: float, number: Signals) -> bool:
    """True: the session had a running process, and a signal was sent. Each process group gets it as one, so that no
    member escapes by a fork."""
    sent = False
    for group in {_group(pid, leader) for pid in members(leader, created)} - {0}:
        try:
            os.killpg(group, number)
            sent = True
        except (ProcessLookupError, PermissionError):  # ended meanwhile; macOS: EPERM for zombies
            continue
    return sent


def terminate_session(leader: int, created: float) -> bool:
    """SIGTERM, then SIGCONT: a stopped process does not act on SIGTERM before it is continued."""
    sent = signal_session(leader, created, Signals.SIGTERM)
    return signal_session(leader, created, Signals.SIGCONT) or sent


def signal_process(pid: int, created: float, number: Signals) -> bool:
    """To exactly this process. True: it was sent."""
    if not is_running(pid, created):
        return False
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def session(pid: int) -> int:
    """The session of the process; 0 = there is no such process."""
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return 0


def _group(pid: int, leader: int) -> int:
    """Its process group, if it still is in the session; else 0."""
    try:
        group = os.getpgid(pid)
    except (ProcessLookupError, PermissionError):
        return 0
    return group if session(pid) == leader else 0


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.NoSuchProcess:  # ZombieProcess is one
        return True
    except psutil.AccessDenied:
        return False
