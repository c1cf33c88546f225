"""A gap in our own execution is no silence of a backend."""

from backends.replica.suspend import SuspendDetector, WakingClock


def test_who_was_always_here_has_heard_it_all() -> None:
    here = SuspendDetector(0.0, interval=1.0)
    for now in range(1, 100):
        here.tick(float(now))
    assert here.cap(50.0, 99.0) == 50.0


def test_after_an_absence_the_count_begins_anew() -> None:
    here = SuspendDetector(0.0, interval=1.0, tolerance=3.0)
    here.tick(1.0)
    here.tick(3600.0)
    assert here.cap(3599.0, 3600.0) == 0.0
    here.tick(3602.0)
    assert here.cap(3601.0, 3602.0) == 2.0


def test_a_late_tick_is_no_absence() -> None:
    here = SuspendDetector(0.0, interval=1.0, tolerance=3.0)
    here.tick(4.0)
    assert here.cap(4.0, 4.0) == 4.0


def test_a_clock_that_stands_still_while_the_machine_sleeps() -> None:
    times = iter([100.0, 101.0, 105.0, 4000.0, 4001.0])
    awake = WakingClock(lambda: next(times), interval=2.0, tolerance=3.0)
    assert [awake() for _ in range(4)] == [101.0, 105.0, 107.0, 108.0]
