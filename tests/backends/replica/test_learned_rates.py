"""How fast a model reads and writes is kept between runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from backends.admission.inflight import InFlight
from backends.admission.reading_rate import LATEST
from backends.domain.spec import Launch
from backends.replica import learned_rates
from backends.replica.learned_rates import EVERY, NAME, RatesMemory
from tests.lives import runtime
from tests.stage import scene

LAUNCH = Launch(("server", "--model", "m"))


def known(folder: Path, *, total: int = 8 << 30) -> InFlight:
    """By a replica of the next gateway."""
    flight = InFlight()
    RatesMemory(flight, LAUNCH, learned_rates.learned_rates(folder, total=total), 0.0)
    return flight


def learn(flight: InFlight, factor: float = 1.0) -> None:
    for tokens in (40, 600, 2000, 9000):
        flight.reading.note(tokens, 0, factor * (0.05 + tokens / 1000 + tokens**2 / 1e7))
    for _ in range(200):
        flight.rhythm.note_gap(0.02 * factor, 1, 1)


def written(folder: Path) -> InFlight:
    rates = learned_rates.learned_rates(folder, total=8 << 30)
    flight = InFlight()
    memory = RatesMemory(flight, LAUNCH, rates, 0.0)
    learn(flight)
    memory.note()
    rates.save()
    return flight


def test_the_next_gateway_knows_them(tmp_path: Path) -> None:
    before, after = written(tmp_path), known(tmp_path)
    for tokens in (700, 5000, 40_000):
        assert after.reading.seconds(tokens) == pytest.approx(before.reading.seconds(tokens), rel=0.01)
    assert after.rhythm.usual_gap == pytest.approx(before.rhythm.usual_gap, rel=0.01)
    assert after.rhythm.deadline(after.workload(1, 0), 0.0) is None, "no process is stalled because of another day"


def test_another_machine_and_other_flags_know_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    assert not known(tmp_path, total=16 << 30).reading.known
    other = Launch((*LAUNCH.argv, "--prefill-step-size", "512"))
    assert learned_rates.learned_rates(tmp_path, total=8 << 30).get(other) is None


def test_a_few_new_ones_overrule_them(tmp_path: Path) -> None:
    written(tmp_path)
    flight = known(tmp_path)
    gap = flight.rhythm.usual_gap
    for _ in range(2):
        learn(flight, factor=5.0)
    assert flight.reading.seconds(9000) == pytest.approx(5 * (9.0 + 8.1), rel=0.2)
    assert flight.rhythm.usual_gap == pytest.approx(5 * gap, rel=0.3)


def test_a_replica_that_has_learned_nothing_does_not_undo_what_another_has(tmp_path: Path) -> None:
    written(tmp_path)
    rates = learned_rates.learned_rates(tmp_path, total=8 << 30)
    busy, idle = InFlight(), InFlight()
    one, other = RatesMemory(busy, LAUNCH, rates, 0.0), RatesMemory(idle, LAUNCH, rates, 0.0)
    learn(busy, factor=3.0)
    before = rates.get(LAUNCH)
    for memory in (one, other):
        memory.tick(EVERY - 1)
    assert rates.get(LAUNCH) == before
    for memory in (one, other):
        memory.tick(EVERY)
    assert rates.get(LAUNCH) != before


def test_two_replicas_add_to_what_is_known(tmp_path: Path) -> None:
    rates = learned_rates.learned_rates(tmp_path)
    flights = InFlight(), InFlight()
    memories = [RatesMemory(flight, LAUNCH, rates, 0.0) for flight in flights]
    for flight, tokens in zip(flights, (700, 9000), strict=True):
        flight.reading.note(tokens, 0, tokens / 1000)
    for memory in memories:
        memory.note()
    kept = rates.get(LAUNCH)
    assert kept is not None
    assert {sample.new for sample in kept.read} == {700, 9000}


SAMPLE = [600, 0, 1.5]


@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        "ab",
        [],
        [0.0, []],
        [True, [SAMPLE]],
        [-1.0, [SAMPLE]],
        [float("nan"), [SAMPLE]],
        [0.1, 5],
        [0.1, [SAMPLE] * 1000],
        [0.1, [5]],
        [0.1, ["abc"]],
        [0.1, [[0, 0, 1.0]]],
        [0.1, [[600, -1, 1.0]]],
        [0.1, [[600.5, 0, 1.0]]],
        [0.1, [[1 << 40, 0, 1.0]]],
        [0.1, [[600, 0, 0]]],
        [0.1, [[600, 0, float("inf")]]],
        {"0": 0.1, "1": []},
    ],
    ids=str,
)
def test_what_cannot_be_true_is_dropped(tmp_path: Path, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path)
    path = tmp_path / NAME
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), value)))
    assert not known(tmp_path).reading.known
    assert "dropped" in caplog.text


def test_a_file_of_any_other_kind_costs_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / NAME).write_text("[1, 2")
    assert not known(tmp_path).reading.known
    assert "set aside" in caplog.text


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    rates, flight = learned_rates.learned_rates(tmp_path), InFlight()
    memory = RatesMemory(flight, LAUNCH, rates, 0.0)
    for tokens in (1 << power for power in range(22)):
        for _ in range(2 * LATEST):
            flight.reading.note(tokens, 0, tokens / 1000)
    memory.note()
    kept = rates.get(LAUNCH)
    assert kept is not None
    assert len(kept.read) < 20


async def test_a_replica_notes_them_when_it_is_closed() -> None:
    world = runtime()
    async with scene() as one:
        world = one.runtime
        await one.ready()
        learn(one.backend.flight)
        launch = one.backend.launch
    assert world.rates.get(launch) is not None
