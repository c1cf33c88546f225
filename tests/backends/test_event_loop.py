"""Nothing that a replica does holds up the event loop, on which all streams of all models move."""

import asyncio
import itertools
import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL

import pytest

from backends.domain.spec import Launch
from backends.domain.state import State
from backends.memory import safetensors
from backends.replica.events import Start
from tests.backends.loop_lag import assert_bounded, measured
from tests.lives import HURRIED, fake, until
from tests.stage import LONG, Scene, rest, scene

pytestmark = pytest.mark.usefixtures("nothing_left")

BOUND = 0.05  # seconds
TENSORS = 170_000  # about 20 MB of header, as of the largest mixtures of experts in one file
PAIRS = 40
LINES = 10_000  # of 1 kB


@pytest.fixture(scope="module")
def large_header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    name = '"model.layers.%d.mlp.switch_mlp.gate_proj.weight"'
    tensor = name + ': {"dtype": "U32", "shape": [4096, 512], "data_offsets": [0, 0]}'
    header = ("{" + ", ".join(tensor % number for number in range(TENSORS)) + "}").encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


async def test_the_helper_sees_a_callback_and_a_thread_that_hold_it_up(large_header: Path) -> None:
    with measured() as lag:
        await asyncio.sleep(0)
        time.sleep(0.06)  # noqa: ASYNC251 - what is to be seen
        await asyncio.sleep(0.02)
    assert lag.callback >= 0.06
    header = (large_header / "model.safetensors").read_bytes()[8:]
    with measured() as lag:
        await asyncio.sleep(0.02)
        await asyncio.to_thread(json.loads, header)
        await asyncio.sleep(0.02)
    assert lag.held >= BOUND


async def test_a_start_with_a_large_header(large_header: Path) -> None:
    async def start() -> None:
        os.utime(large_header / "model.safetensors", ns=(0, next(changed)))  # not read yet
        async with scene(Launch(fake(), model_folder=str(large_header))) as s:
            object.__setattr__(s.runtime, "measure", lambda _: safetensors.size_of(large_header))
            await s.ready()

    changed = itertools.count(time.time_ns())
    await assert_bounded(start, BOUND)


async def test_a_death_and_the_next_start() -> None:
    async def die() -> None:
        async with scene() as s:
            await s.ready()
            os.kill(s.pid, SIGKILL)
            await s.state(State.READY, generation=2)

    await assert_bounded(die, BOUND)


async def test_many_requests() -> None:
    async def ask(s: Scene) -> None:
        lease, exchange = s.ask()
        await exchange.start()
        assert b"[DONE]" in await rest(exchange)
        exchange.close()
        lease.release()

    async def serve() -> None:
        async with scene() as s:
            await s.ready()
            for _ in range(PAIRS):
                await asyncio.gather(ask(s), ask(s))

    await assert_bounded(serve, BOUND)


FLOODS = {
    "empty": "",
    "short": "tick",
    "ordinary": "some server chatter about nothing much at all, really, that goes on for a while",
    "long": "some server chatter about nothing much, " * 25,
    "without spaces": "abcdefgh" * 125,
    "failures": "RuntimeError: [METAL] Command buffer execution failed: Internal Error (0000000e:Internal Error)",
}


@pytest.mark.slow
@pytest.mark.parametrize("line", FLOODS.values(), ids=FLOODS)
async def test_a_flood_of_output_is_read_as_it_comes(line: str) -> None:
    """About 1 MB, in pieces as large as the pipe gives them; each line is looked up in the table of signatures."""
    count = min(1_000_000 // (len(line) + 1), 200_000)
    text = f"{line + chr(10)!r} * {count} + 'flooded\\n'"
    script = f"import sys, time\nsys.stdout.write({text})\nsys.stdout.flush()\ntime.sleep(60)"

    async def flood() -> None:
        async with scene(Launch((sys.executable, "-c", script)), timeouts=replace(LONG, stop=0.0)) as s:
            s.backend.command(Start())
            await until(lambda: "flooded" in s.backend.output.tail(1), within=100.0)
            await asyncio.sleep(10 * HURRIED.start_pause)  # the start is judged again and again, by its output too

    await assert_bounded(flood, BOUND)


def flooding(when: Path) -> Launch:
    """It prints LINES lines of 1 kB once the file ``when`` is there, each with a word that looks like trouble."""
    line = "ERROR - " + "x" * 1000
    flood = f"until [ -e {when} ]; do sleep 0.01; done; yes '{line}' | head -n {LINES}; echo flooded; sleep 60"
    return Launch(("/bin/sh", "-c", f"({flood}) & exec {shlex.join(fake())}"))


async def test_a_flood_of_output(tmp_path: Path) -> None:
    async def flood() -> None:
        when = tmp_path / str(next(number))
        async with scene(flooding(when)) as s:
            await s.ready()
            when.touch()
            await until(lambda: "flooded" in s.backend.output.tail(5), "all of it is there")

    number = itertools.count()
    await assert_bounded(flood, BOUND)
