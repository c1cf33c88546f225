"""Ports, with real sockets and real processes that hold them."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psutil
import pytest

from backends.process import ports
from gateway.cli.server import CannotListen, bind

LOOPBACK = "127.0.0.1"
LISTEN = """
import os, signal, socket, sys
s = socket.socket()
s.bind(("127.0.0.1", 0))
s.listen()
print(s.getsockname()[1], flush=True)
signal.pause()
"""
FORKED = "import os\nif os.fork(): os.wait()\n" + LISTEN
ORPHANED = "import os\nif os.fork(): os._exit(0)\n" + LISTEN
MUTE = "import signal\nprint(0, flush=True)\nsignal.pause()\n"


@contextmanager
def process(code: str) -> Iterator[tuple[int, int]]:
    """The pid of a process in a session of its own, and the port it (or a child) says it listens on."""
    argv = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as started:
        assert started.stdout is not None
        try:
            yield started.pid, int(started.stdout.readline())
        finally:
            os.killpg(started.pid, signal.SIGKILL)


def listening(host: str = LOOPBACK) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((host, 0))
    server.listen()
    return server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def test_a_free_port_can_be_bound() -> None:
    port = ports.free_port(LOOPBACK)
    assert ports.is_free(LOOPBACK, port)
    with closing(socket.create_server((LOOPBACK, port))):
        assert not ports.is_free(LOOPBACK, port)


def test_a_promised_port_is_not_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.getsockname
    offers = iter([4001, 4002, 4003])
    monkeypatch.setattr(socket.socket, "getsockname", lambda self: (real(self)[0], next(offers)))
    assert ports.free_port(LOOPBACK, avoid={4001, 4002}) == 4003


def test_names_are_resolved() -> None:
    assert ports.is_free("localhost", ports.free_port("localhost"))


def test_ipv6() -> None:
    try:
        server = listening("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with closing(server):
        assert not ports.is_free("::1", port_of(server))
        assert ports.holder("::1", port_of(server)) is not None


def test_a_wildcard_is_not_free_beside_a_listener_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS lets both listen; here the bind to the wildcard is made to succeed as it does there."""
    can_bind = ports._can_bind
    as_on_macos = lambda family, address: address[0] in ("0.0.0.0", "::") or can_bind(family, address)  # noqa: E731, S104
    monkeypatch.setattr(ports, "_can_bind", as_on_macos)
    with closing(listening()) as server:
        port = port_of(server)
        assert not ports.is_free("0.0.0.0", port)  # noqa: S104
        assert not ports.is_free("::", port)
        assert ports.hidden_by_loopback("0.0.0.0", port)  # noqa: S104
        assert not ports.hidden_by_loopback(LOOPBACK, port), "that is plainly taken"
        with pytest.raises(CannotListen, match=rf"held by .*pid {os.getpid()}"):
            bind("0.0.0.0", port)  # noqa: S104
    assert ports.is_free("0.0.0.0", port)  # noqa: S104


def test_a_scan_without_descriptors_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_pid: int) -> list[object]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(ports, "_listening", none_left)
    assert ports.listener_is(os.getpid(), 1) is None


def test_bound_without_listening_is_free_only_where_a_server_could_listen() -> None:
    """Without SO_REUSEADDR on the other side nobody can bind, listening or not."""
    with closing(socket.socket()) as rude:
        rude.bind((LOOPBACK, 0))
        assert not ports.is_free(LOOPBACK, port_of(rude))


def test_a_connection_in_time_wait_does_not_hold_the_port() -> None:
    with closing(listening()) as server:
        port = port_of(server)
        client = socket.create_connection((LOOPBACK, port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first waits
        assert client.recv(1) == b""
        client.close()
    assert ports.is_free(LOOPBACK, port)


def test_trouble_with_the_host_is_not_called_a_taken_port() -> None:
    with pytest.raises(OSError, match=r"."):
        ports.is_free("192.0.2.1", 0)  # a documentation address: no machine has it


def test_holder_names_the_process() -> None:
    with process(LISTEN) as (pid, port):
        assert ports.holder(LOOPBACK, port) == f"{psutil.Process(pid).name()} (pid {pid})"


def test_holder_finds_a_listener_on_all_addresses() -> None:
    with closing(listening("0.0.0.0")) as server:  # noqa: S104 - that is the case
        assert str(os.getpid()) in str(ports.holder(LOOPBACK, port_of(server)))


def test_nobody_holds_a_free_port() -> None:
    assert ports.holder(LOOPBACK, ports.free_port(LOOPBACK)) is None


def test_holder_of_another_address_is_not_meant() -> None:
    with process(LISTEN) as (_, port):
        assert ports.holder("127.0.0.2", port) is None


@pytest.mark.parametrize("code", [LISTEN, FORKED, ORPHANED], ids=["itself", "child", "orphan in its group"])
def test_the_listener_is_the_process_or_of_its_kin(code: str) -> None:
    with process(code) as (pid, port):
        assert ports.listener_is(pid, port) is True
        assert ports.listener_is(pid, ports.free_port(LOOPBACK)) is False


def test_another_process_on_the_port_is_not_ours() -> None:
    with process(LISTEN) as (_, port), process(MUTE) as (other, _):
        assert ports.listener_is(other, port) is False


def test_a_process_that_is_gone_listens_nowhere() -> None:
    with process(LISTEN) as (pid, port):
        pass
    assert ports.listener_is(pid, port) is False


def test_a_refusal_to_tell_is_not_taken_for_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: psutil.Process, kind: str = "inet") -> None:
        raise psutil.AccessDenied(self.pid)

    with process(LISTEN) as (pid, port):
        monkeypatch.setattr(psutil.Process, "net_connections", denied)
        assert ports.listener_is(pid, port) is None


def test_holder_process_by_process_as_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(kind: str = "inet") -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "LINUX", False)
    monkeypatch.setattr(psutil, "net_connections", denied)
    with process(LISTEN) as (pid, port):
        assert f"(pid {pid})" in str(ports.holder(LOOPBACK, port))
