"""The budget of bytes for all request bodies (``server.body_memory``): what is being received, what is decompressed,
and what is kept of parsed requests until they are answered.

A body takes its share piece by piece, so that a client that only announces one takes nothing. Where a piece does not
fit, its request is refused and its share given back, so the others always get on. Beyond that:

    small bodies    have an eighth of the budget for themselves: a few large uploads do not shut out everybody else
    the only one    a parsed request that is the only large one is kept whatever it takes (up to four times its text,
                    where that holds one character beyond U+FFFF): nothing would ever make room for it

Used by the event loop and by the threads that parse bodies.
"""

import threading

SMALL = 256 << 10  # bytes
RESERVED = 8  # one part in so many is for small bodies


class OutOfBodyMemory(Exception):
    """``asked``: bytes that were to be held; ``held``: by the other requests; ``total``: the budget. ``fits_alone``:
    there would be room if the others had ended."""

    def __init__(self, asked: int, held: int, total: int, *, fits_alone: bool) -> None:
        super().__init__(f"{asked} bytes on top of {held} of {total}")
        self.asked = asked
        self.held = held
        self.total = total
        self.fits_alone = fits_alone


class BodyMemory:
    """``total``: bytes."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0  # bytes
        self._large = 0  # shares that are larger than ``SMALL``
        self._lock = threading.Lock()

    def share(self) -> "Share":
        """Of one request; to be released."""
        return Share(self)

    def _resize(self, share: "Share", after: int, *, keep: bool) -> None:
        with self._lock:
            if share.released:
                return
            before, others, limit = share.size, self._large - (share.size > SMALL), self._limit(after)
            if after > before and self.held - before + after > limit and not (keep and not others):
                raise OutOfBodyMemory(after, self.held - before, self.total, fits_alone=keep or after <= limit)
            self.held += after - before
            self._large = others + (after > SMALL)
            share.size = after

    def _release(self, share: "Share") -> None:
        with self._lock:
            self.held -= share.size
            self._large -= share.size > SMALL
            share.size, share.released = 0, True

    def _limit(self, size: int) -> int:
        return self.total if size <= SMALL else self.total - self.total // RESERVED


class Share:
    """``size``: bytes."""

    __slots__ = ("_memory", "released", "size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.size = 0
        self.released = False

    def expect(self, size: int) -> None:
        """Raises OutOfBodyMemory if a body of that size would not fit now. Takes nothing."""
        before = self.size
        self.resize(size)
        self.resize(before)

    def resize(self, size: int, *, keep: bool = False) -> None:
        """``keep``: of a parsed request. Raises OutOfBodyMemory; less always fits."""
        self._memory._resize(self, size, keep=keep)  # noqa: SLF001  two classes, one thing

    def release(self) -> None:
        """For good: a thread may still be at work for a request that has ended."""
        self._memory._release(self)  # noqa: SLF001  as above
