"""What a process holds, from its footprint and its own figures."""

from dataclasses import replace

from backends.domain.report import EngineReport
from backends.memory import measured

GB = 10**9


def report(**changed: int) -> EngineReport:
    told = EngineReport(active=3 * GB, pooled=GB, peak=5 * GB, reading=0, decoding=0)
    return replace(told, **changed)  # type: ignore[arg-type]


def test_in_unified_memory_the_footprint_has_everything() -> None:
    assert measured.held(6 * GB, report()) == 6 * GB
    assert measured.working(6 * GB, report(cached_bytes=2 * GB)) == 3 * GB


def test_the_resident_set_lacks_the_memory_of_a_gpu() -> None:
    assert measured.held(GB, report()) == 4 * GB
    assert measured.working(GB, report(cached_bytes=GB)) == 2 * GB


def test_without_a_report_or_a_footprint_there_is_the_other() -> None:
    assert measured.held(GB, None) == GB
    assert measured.held(None, None) == 0
    assert measured.held(None, report()) == 4 * GB


def test_a_cache_cannot_be_larger_than_what_is_in_use() -> None:
    """The same buffers may count for several entries."""
    assert measured.working(None, report(cached_bytes=9 * GB)) == 0


def test_a_pool_is_idle_some_seconds_after_the_last_request() -> None:
    assert measured.pool_is_idle(report(), measured.IDLE)
    assert not measured.pool_is_idle(report(), measured.IDLE - 1)
    assert not measured.pool_is_idle(report(pooled=measured.MIN_POOL - 1), 100.0)
    assert not measured.pool_is_idle(report(decoding=1), 100.0), "an abandoned request"
