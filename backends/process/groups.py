"""Process groups: their members, and signals to all of them.

Every child leads its own session, so its pid is also its process group id and its session id. A pid alone is never
trusted: pids are reused, and a recorded one may be days old. So a process is identified by (pid, create_time), where
create_time is only ever compared, and on Linux is meaningful only together with ``boot()``.

Caveat: a group may outlive its leader (``sh -c "server & wait"``), and while it does, no kernel gives its id to a new
process. So if another process has the leader's pid, the group has ended; if no process has it, all processes in the
group and session of that id are still ours.

Works per pid, without reading command lines: on macOS that can block for minutes on protected processes.
"""

import os
from pathlib import Path
from signal import Signals

import psutil

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


def members(leader: int, created: float) -> list[int]:
    """The running processes of the group that (leader, created) leads, or led."""
    if leader <= 1:
        raise ValueError(f"{leader} is no process group that may be signalled")
    if create_time(leader) not in {None, created}:
        return []
    try:
        os.killpg(leader, 0)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM when only zombies are left
        return []
    return [pid for pid in psutil.pids() if pid > 1 and _belongs(pid, leader) and not _is_zombie(pid)]


def signal_group(leader: int, created: float, number: Signals) -> bool:
    """True: the group had a running process, and the signal was sent."""
    if not members(leader, created):
        return False
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # ended meanwhile; macOS: EPERM for zombies
        return False
    return True


def terminate_group(leader: int, created: float) -> bool:
    """SIGTERM, then SIGCONT: a stopped process does not act on SIGTERM before it is continued."""
    sent = signal_group(leader, created, Signals.SIGTERM)
    return signal_group(leader, created, Signals.SIGCONT) or sent


def _belongs(pid: int, leader: int) -> bool:
    try:
        return os.getpgid(pid) == leader and os.getsid(pid) == leader
    except (ProcessLookupError, PermissionError):
        return False


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.NoSuchProcess:  # ZombieProcess is one
        return True
    except psutil.AccessDenied:
        return False
