"""Binding, and what is said when that cannot be."""

import errno
import os
import socket

import pytest

from gateway.server import CannotListen, _announce, bind


def test_a_free_port_is_found_and_listened_on() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert port > 0
        assert not sock.getblocking()
        with socket.create_connection(("127.0.0.1", port)):
            pass


def test_a_port_that_is_taken_names_who_holds_it() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(CannotListen) as caught:
            bind("127.0.0.1", port)
        message = str(caught.value)
        assert f"cannot listen on 127.0.0.1:{port}" in message
        assert os.strerror(errno.EADDRINUSE) in message
        assert f"(pid {os.getpid()})" in message
        assert "--port" in message


def test_a_port_that_was_given_back_is_free_at_once() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        served, _ = socket.socket.accept(sock)
        served.close()  # ours closes first, so ours is the side in TIME_WAIT
        client.close()
    with bind("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(CannotListen) as caught:
        bind("203.0.113.7", 0)
    assert "cannot listen on 203.0.113.7:0" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EADDRNOTAVAIL


def test_a_failed_bind_leaves_no_socket_behind() -> None:
    with bind("127.0.0.1", 0) as sock:
        before = len(os.listdir("/dev/fd"))
        for _ in range(3):
            with pytest.raises(CannotListen):
                bind("127.0.0.1", sock.getsockname()[1])
        assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_one_line_says_where_it_listens(host: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        sock = bind(host, 0)
    except CannotListen:
        pytest.skip(f"this machine has no {host}")
    with sock:
        _announce(sock, "")
        _announce(sock, "try {url}/v1/models")
        port = sock.getsockname()[1]
    assert capsys.readouterr().out == f"listening on {url}{port}\nlistening on {url}{port}\ntry {url}{port}/v1/models\n"
