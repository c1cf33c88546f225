"""A gateway whose output nobody reads: it goes on working, and ends when told to."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.integration.harness import command, environment, wait_until, write_config
from tests.integration.wire import chat

pytestmark = pytest.mark.slow

REQUESTS = 2000  # each logs a line of more than 200 bytes: more than the pipe and the queue hold
STOP_WITHIN = 10.0  # seconds


@pytest.mark.parametrize("read_again", [True, False])
def test_nobody_reads_the_log(tmp_path: Path, read_again: bool) -> None:
    config = write_config(tmp_path, {"models": {"a": {"urls": ["http://127.0.0.1:9"]}}})
    reader, writer = os.pipe()
    args = command("serve", str(config), "--port", "0")
    process = subprocess.Popen(args, stdout=writer, stderr=writer, env=environment(tmp_path), cwd=tmp_path)
    os.close(writer)
    try:
        said = b""
        while not (found := re.search(rb"listening on (\S+)\n", said)):
            said += os.read(reader, 4096)
        with httpx.Client(base_url=found[1].decode(), timeout=10.0) as client:
            for n in range(REQUESTS):
                client.headers["x-request-id"] = f"{n:-<128}"
                assert client.post("/v1/chat/completions", json=chat("hello", "unknown")).status_code == 404
            assert client.get("/livez").status_code == 200
        if read_again:
            while not (dropped := re.search(rb"output dropped lines=(\d+)", said)):
                said += os.read(reader, 1 << 16)
            assert said.count(b"info    request ") + int(dropped[1]) == REQUESTS
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_WITHIN) == 0
        assert time.monotonic() - began < STOP_WITHIN
        if read_again:
            wait_until(lambda: b"draining" in os.read(reader, 1 << 16), what="the last lines")
    finally:
        process.kill()
        process.wait()
        os.close(reader)
