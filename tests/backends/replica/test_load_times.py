"""How long a load takes is kept between runs: the first estimate of the next gateway."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from backends.domain.spec import Launch
from backends.replica import load_times
from backends.replica.events import Start
from backends.replica.load_times import load_times as kept_times
from backends.replica.supervised import SupervisedReplica
from tests.lives import runtime
from tests.stage import scene

LAUNCH = Launch(("server", "--model", "m"))


async def test_a_load_is_measured_and_the_next_gateway_knows_it(tmp_path: Path) -> None:
    async with scene() as first:
        assert (first.backend.snapshot().eta, first.backend.snapshot().loading) == (None, None)
        await first.ready()
        launch, times = first.backend.launch, first.runtime.load_times
    took = times.get(launch)
    assert took is not None
    assert 0 < took < 30
    kept = kept_times(tmp_path)
    kept.note(launch, took)
    kept.save()
    assert load_times.known(tmp_path, launch) == took
    again = replace(runtime(), load_times=kept_times(tmp_path))
    spec = replace(first.backend.spec, on_demand=True)
    assert SupervisedReplica(spec, launch, again).snapshot().eta == took


async def test_while_it_loads_the_earlier_measurement_is_told() -> None:
    async with scene() as one:
        one.runtime.load_times.note(one.backend.launch, 7.5)
        again = SupervisedReplica(one.backend.spec, one.backend.launch, one.runtime)
        try:
            again.command(Start())
            loading = again.snapshot().loading
            assert loading is not None
            assert loading.expected == 7.5
        finally:
            await again.close()


@pytest.mark.parametrize("seconds", [-1, 1e9, True, "5", None, [5]])
def test_a_time_that_cannot_be_true_is_dropped(tmp_path: Path, seconds: object) -> None:
    path = tmp_path / load_times.NAME
    times = kept_times(tmp_path)
    times.note(LAUNCH, 5.0)
    times.save()
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), seconds)))
    assert load_times.known(tmp_path, LAUNCH) is None
    assert kept_times(tmp_path).get(LAUNCH) is None


def test_to_look_a_time_up_changes_nothing(tmp_path: Path) -> None:
    assert load_times.known(tmp_path / "nothing", LAUNCH) is None
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / load_times.NAME
    path.write_text("{")
    assert load_times.known(tmp_path, LAUNCH) is None
    assert [each.name for each in tmp_path.iterdir()] == [load_times.NAME]
