"""What each replica may use of the memory: the division of the whole among replicas, and the parts of one share.

    share = base          weights and runtime: what the process holds while it is idle, with empty caches
          + prompt cache  conversations that are found again, and the key-value caches of the batch
          + batch         by what the batch may grow beyond that: a request that joins, its prefill, the copies

Replicas that are never unloaded, those that are loaded, and those that wait for memory share the surplus beyond what
all of them need; the need of the largest model that is loaded on demand is left free for it.

The server trims its prompt cache at each admission to ``--prompt-cache-bytes`` minus what the batch holds already
(``ResponseGenerator._generate``). So that size is for both, and a conversation that is being continued takes twice its
own: in the cache, and in the batch.

The limits are mlx's. That of the pool (``set_cache_limit``) bounds the freed buffers that are kept for reuse: by
default, on Metal, they are kept until the process holds 95 % of the recommended working set, which all processes share.
The memory limit is soft (``metal/allocator.cpp``, ``transforms.cpp``): above it the pool is emptied first, then each
step waits for the one before. It is set to the share where that covers what the replica needs, and never below what it
holds: a limit that slows down a batch which fits is worse than none.

Pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from backends.domain.share import Share, Source
from backends.mlx_server import PROMPT_CACHE_BYTES

MIN_ENTRIES = 64  # prompts in the prompt cache: the title jobs of clients must not push out conversations
MAX_ENTRIES = 1024
SHORT_PROMPT = 1024  # tokens; there is an entry for each so many that the cache could hold
MAX_CACHED_TOKENS = 1_000_000  # measured with mlx-lm 0.32: 163 ms for each garbage collection at that number
TRIE_BYTES = 250  # of Python objects for each cached token, measured likewise; --prompt-cache-bytes does not count them
MIN_PROMPT_CACHE = 256 << 20  # bytes
MIN_POOL = 256 << 20  # bytes; a smaller pool makes each step allocate
JOINING = 2  # requests of the whole context by which a batch grows, where none was measured
GROWTH = 1.25  # of the largest batch that was measured
OTHERS = 0.1  # share of the machine's memory that is left to other programs, where the budget is what it can give now
MOST = 0.75  # of the machine's memory: Metal recommends no larger working set
LEAST_LIMIT = 1.25  # of what a process has in use: its memory limit is not set lower
CHANGE = 0.1  # share of a figure by which it must change to be told
MOST_OF_DEVICE = 0.9  # of the memory of a CUDA GPU: its driver and the contexts of the processes take some


@dataclass(frozen=True, slots=True)
class Appetite:
    """What one replica would use, in bytes. ``sequence``: key-value cache and prefill of one request of its context;
    ``token``: key-value cache for one token; ``measured``: the largest batch seen, 0 = none; ``most``: the model's
    ``memory``, as configured; ``prompt_cache``, ``entries``: as configured, None = ours to choose."""

    base: int
    sequence: int
    token: float
    measured: int = 0
    most: int | None = None
    prompt_cache: int | None = None
    entries: int | None = None
    source: Source = Source.FILES

    @property
    def need(self) -> int:
        """The minimum to be of use."""
        return self.base + self.sequence

    @property
    def batch(self) -> int:
        """By how much the batch grows between two admissions."""
        return max(int(self.measured * GROWTH), self.sequence * JOINING)


@dataclass(frozen=True, slots=True)
class Ours:
    """Which sizes are ours to choose; the others were written by the user, and are never changed."""

    prompt_cache: bool = True
    entries: bool = True
    pool: bool = True


@dataclass(frozen=True, slots=True)
class Claimant:
    """One replica that shares the memory. ``resident``: never unloaded, loaded, or about to be; else only the need of
    the largest such model that can be loaded counts."""

    id: str
    model: str
    appetite: Appetite
    resident: bool


UNKNOWN = Share(0, 0, 0, PROMPT_CACHE_BYTES, MIN_ENTRIES)  # where nothing is known of the model's size


def capacity(*, total: int, available: int, held: int, budget: int | None, working_set: int | None) -> int:
    """Bytes for all our models. ``available``: bytes of the machine; ``held``: bytes that our processes hold already.
    ``working_set``: bytes that the GPU can have, None = not known."""
    if budget is not None:
        return min(budget, total if working_set is None else working_set)
    most = int(MOST * total) if working_set is None else working_set
    return max(0, min(available + held - int(OTHERS * total), most))


def divide(capacity: int, claimants: Sequence[Claimant], most: float = math.inf) -> dict[str, int]:
    """By id, the bytes of each resident claimant; at least its need. ``most``: bytes that there can ever be; nothing is
    left free for a model that needs more."""
    residents = [one for one in claimants if one.resident]
    needed = sum(one.appetite.need for one in residents)
    surplus = max(0, capacity - needed - _reserve(claimants, most))
    shares = {one.id: one.appetite.need for one in residents}
    for left, one in zip(range(len(residents), 0, -1), sorted(residents, key=_room), strict=True):
        more = int(min(surplus // left, _room(one)))
        shares[one.id] += more
        surplus -= more
    return shares


def _room(one: Claimant) -> float:
    """Bytes that it may use beyond its need."""
    appetite = one.appetite
    return math.inf if appetite.most is None else max(0, appetite.most - appetite.need)


def _reserve(claimants: Sequence[Claimant], most: float) -> int:
    """Bytes for the largest model that is not loaded, of those that can be."""
    needs = (one.appetite.need for one in claimants if not one.resident)
    return max((need for need in needs if need <= most), default=0)


def split(total: int, appetite: Appetite) -> Share:
    """The parts of a share of ``total`` bytes."""
    left = max(0, total - appetite.base)
    cached = _chosen(left, appetite) if appetite.prompt_cache is None else appetite.prompt_cache
    beside = max(0, left - cached)
    fits = total >= appetite.need + min(cached, MIN_PROMPT_CACHE)
    entries = cached // max(1, int(SHORT_PROMPT * appetite.token))
    return Share(
        total=total,
        base=appetite.base,
        batch=beside,
        prompt_cache=cached,
        entries=max(MIN_ENTRIES, min(MAX_ENTRIES, entries)) if appetite.entries is None else appetite.entries,
        pool=max(MIN_POOL, beside) if fits else MIN_POOL,
        limit=total if fits else None,
        source=appetite.source,
    )


def _chosen(left: int, appetite: Appetite) -> int:
    """Bytes of the prompt cache. ``left``: without weights and runtime."""
    batch = max(min(appetite.batch, left // 2), appetite.sequence)
    room = max(left - batch, left // 4, MIN_PROMPT_CACHE)
    filled = int(room * appetite.token / (appetite.token + TRIE_BYTES))
    return max(MIN_PROMPT_CACHE, min(filled, int(MAX_CACHED_TOKENS * appetite.token)))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a process is told, in bytes and prompts; None = it is left as it is."""

    prompt_cache: int | None = None
    entries: int | None = None
    pool: int | None = None
    limit: int | None = None

    def differ(self, told: "Sizes") -> bool:
        """By so much that the process has to be told: available memory changes all the time, and a command takes some
        of the server's."""
        return any(
            now is not None and (old is None or abs(now - old) > CHANGE * old)
            for now, old in (
                (self.prompt_cache, told.prompt_cache),
                (self.entries, told.entries),
                (self.pool, told.pool),
                (self.limit, told.limit),
            )
        )


def sizes(share: Share, active: int, ours: Ours) -> Sizes:
    """``active``: bytes that the process has in use."""
    return Sizes(
        prompt_cache=share.prompt_cache if ours.prompt_cache else None,
        entries=share.entries if ours.entries else None,
        pool=share.pool if ours.pool else None,
        limit=None if share.limit is None else max(share.limit, int(LEAST_LIMIT * active)),
    )
