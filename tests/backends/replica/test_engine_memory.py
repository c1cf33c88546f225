"""What a process is told about memory, and what is learned from what it tells."""

from dataclasses import dataclass, replace

import pytest

from backends import mlx_server
from backends.domain.engine_command import BoundPromptCache, EngineCommand, ReleasePool, SetLimits
from backends.domain.report import EngineReport
from backends.domain.share import Share
from backends.domain.spec import Launch
from backends.memory.learned_sizes import high_water_marks, idle_sizes
from backends.memory.measured import IDLE
from backends.replica.engine_memory import SETTLED, EngineMemory

GB = 10**9
SHARE = Share(total=20 * GB, base=3 * GB, batch=9 * GB, prompt_cache=8 * GB, entries=100, pool=9 * GB, limit=20 * GB)
REPORT = EngineReport(active=4 * GB, pooled=GB, peak=5 * GB, reading=0, decoding=0, cached_bytes=GB)


@dataclass
class Measured:
    now: int | None = 6 * GB
    peak: int = 7 * GB


class Stage:
    def __init__(self, **server_args: str | int | None) -> None:
        self.told: list[EngineCommand] = []
        self.share = SHARE
        self.peaks, self.bases = high_water_marks(), idle_sizes()
        self.launch = Launch(mlx_server.argv("m", server_args, instrumented=True))
        self.memory = EngineMemory(
            self.launch, share=lambda: self.share, tell=self.told.append, peaks=self.peaks, bases=self.bases
        )
        self.flags = self.memory.placeholders()
        self.now = 100.0

    def update(
        self, report: EngineReport | None = REPORT, *, idle: float = 0.0, memory: Measured | None = None
    ) -> None:
        self.now += 1
        self.memory.update(report, memory or Measured(), idle=idle, now=self.now)

    def heard(self) -> list[EngineCommand]:
        told, self.told[:] = list(self.told), []
        return told


def test_the_flags_come_from_the_share_and_changes_of_it_are_told() -> None:
    stage = Stage()
    assert stage.flags == {"prompt_cache_bytes": str(8 * GB), "prompt_cache_size": "100"}
    stage.update()
    assert stage.heard() == [BoundPromptCache(8 * GB, 100), SetLimits(9 * GB, 20 * GB)]
    stage.update()
    assert stage.heard() == []
    stage.share = replace(SHARE, prompt_cache=4 * GB)
    stage.update()
    assert stage.heard()[0] == BoundPromptCache(4 * GB, 100)
    assert stage.memory.share == stage.share


def test_what_the_user_wrote_is_never_changed() -> None:
    stage = Stage(**{"prompt-cache-bytes": "64MB"})
    stage.update()
    assert stage.heard() == [BoundPromptCache(None, 100), SetLimits(9 * GB, 20 * GB)]
    stage = Stage(**{"prompt-cache-bytes": None})
    stage.update()
    assert stage.heard() == [SetLimits(9 * GB, 20 * GB)]


def test_a_process_that_fell_silent_is_told_again() -> None:
    stage = Stage()
    stage.update()
    stage.update(None)
    stage.heard()
    stage.update()
    assert len(stage.heard()) == 2


def test_an_idle_pool_is_released_once() -> None:
    stage = Stage()
    stage.update(idle=IDLE - 1)
    stage.heard()
    stage.update(idle=IDLE)
    assert stage.heard() == [ReleasePool()]
    stage.update(idle=IDLE + 1)
    assert stage.heard() == [], "it was told"


def test_for_another_model_the_pool_is_released_at_once_after_the_cache_was_bound() -> None:
    stage = Stage()
    stage.update()
    stage.heard()
    stage.share = replace(SHARE, prompt_cache=GB)
    stage.memory.release(REPORT)
    assert stage.heard() == [BoundPromptCache(GB, 100), SetLimits(9 * GB, 20 * GB), ReleasePool()]


def test_what_is_cached_makes_room_for_a_batch_but_for_a_quarter() -> None:
    stage = Stage()
    stage.update()
    full = replace(REPORT, cached_bytes=8 * GB)
    assert stage.memory.room(full) == 15 * GB, "the share without the base and what stays cached"
    assert stage.memory.room(None) == 9 * GB, "beside a full cache"
    stage.heard()
    stage.memory.make_room(full, lambda: 8 * GB)
    assert stage.heard() == [], "the batch fits beside it"
    stage.memory.make_room(full, lambda: 12 * GB)
    assert stage.heard() == [BoundPromptCache(5 * GB)]
    stage.memory.make_room(full, lambda: 100 * GB)
    assert stage.heard() == [BoundPromptCache(2 * GB)]
    stage.update(full)
    assert stage.heard()[0] == BoundPromptCache(8 * GB, 100), "its whole size again"


def test_for_a_batch_that_grows_all_that_is_cached_makes_room() -> None:
    stage = Stage()
    stage.update()
    stage.heard()
    full = replace(REPORT, cached_bytes=8 * GB)
    assert (stage.memory.beside(full), stage.memory.most(full)) == (9 * GB, 17 * GB)
    stage.memory.make_room(full, lambda: 16 * GB, all_of_it=True)
    assert stage.heard() == [BoundPromptCache(GB)]
    stage.memory.make_room(full, lambda: 100 * GB, all_of_it=True)
    assert stage.heard() == [BoundPromptCache(0)]


@pytest.mark.parametrize("entries", ["0", "1"])
def test_a_number_of_entries_that_the_user_wrote_is_not_changed(entries: str) -> None:
    stage = Stage(**{"prompt-cache-size": entries})
    stage.update()
    assert [each.entries for each in stage.heard() if isinstance(each, BoundPromptCache)] == [None]
    stage.memory.make_room(replace(REPORT, cached_bytes=8 * GB), lambda: 100 * GB, all_of_it=True)
    assert stage.heard() == [BoundPromptCache(0)]


def test_a_cache_of_the_users_size_makes_no_room() -> None:
    stage = Stage(**{"prompt-cache-bytes": "8GB"})
    stage.update()
    stage.heard()
    full = replace(REPORT, cached_bytes=7 * GB)
    assert stage.memory.room(full) == 10 * GB
    stage.memory.make_room(full, lambda: 100 * GB)
    stage.memory.make_room(full, lambda: 100 * GB, all_of_it=True)
    assert (stage.memory.beside(full), stage.memory.most(full)) == (None, 10 * GB)
    assert stage.heard() == []


def test_the_first_idle_figures_are_what_an_idle_process_holds_and_the_highest_what_work_takes() -> None:
    stage = Stage()
    stage.update(memory=Measured(3 * GB))
    assert stage.bases.get(stage.launch) is None, "its footprint was measured while it loaded"
    stage.now += SETTLED
    stage.update(replace(REPORT, decoding=1))
    assert stage.bases.get(stage.launch) is None, "it works"
    stage.update()
    assert stage.bases.get(stage.launch) == 4 * GB, "without the pool and the prompt cache"
    stage.update(replace(REPORT, active=9 * GB, decoding=1), memory=Measured(11 * GB))
    assert (stage.bases.get(stage.launch), stage.peaks.get(stage.launch)) == (4 * GB, 9 * GB)
    stage.update(memory=Measured(5 * GB))
    assert stage.bases.get(stage.launch) == 3 * GB, "after a crowd it held more"
    stage.memory.note_exit(50 * GB)
    assert stage.peaks.get(stage.launch) == 9 * GB, "a footprint has the caches in it"


def test_a_footprint_of_the_start_is_not_what_the_work_takes() -> None:
    stage = Stage()
    stage.update(memory=Measured(9 << 20, peak=9 << 20))
    assert stage.peaks.get(stage.launch) is None
    stage.memory.note_exit(5 * GB)
    assert stage.peaks.get(stage.launch) == 5 * GB, "the process has ended before more was known"


def test_a_process_that_tells_nothing_is_known_by_its_footprint() -> None:
    stage = Stage()
    stage.update(None)
    assert (stage.peaks.get(stage.launch), stage.bases.get(stage.launch)) == (7 * GB, None)
    stage.memory.note_exit(8 * GB)
    assert stage.peaks.get(stage.launch) == 8 * GB
    assert stage.heard() == []
