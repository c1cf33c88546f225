"""What a process holds, from its footprint and from what it tells of itself (``domain.report``).

The footprint (``host.footprint``) is the kernel's: on a Mac it has everything, Metal's buffers, Python and the code
included; on Linux, the resident set, without the memory of a GPU. A report has what mlx's allocator holds: ``active``
(weights, caches, the batch) and ``pooled`` (freed buffers), in unified or the GPU's memory.

    held      the larger of the two: on a Mac and on the CPU the footprint, on an NVIDIA GPU active + pooled
    working   held without freed buffers and without the prompt cache: what must be there again for the same work
    idle      working, while no request is in flight: weights, runtime, Python

Pure.
"""

from backends.domain.report import EngineReport

IDLE = 10.0  # seconds
MIN_POOL = 64 << 20  # bytes of freed buffers that are worth a command


def held(footprint: int | None, report: EngineReport | None) -> int:
    """Bytes; 0 = not known."""
    return max(footprint or 0, 0 if report is None else report.active + report.pooled)


def working(footprint: int | None, report: EngineReport) -> int:
    """Bytes. A prompt cache that does not tell its size counts as work."""
    return max(0, held(footprint, report) - report.pooled - min(report.cached_bytes or 0, report.active))


def is_idle(report: EngineReport) -> bool:
    return not (report.reading or report.decoding)


def pool_is_idle(report: EngineReport, idle: float) -> bool:
    """The freed buffers are of no use for now. ``idle``: seconds since the last request ended; the next one pays for
    new buffers with a few milliseconds."""
    return idle >= IDLE and report.pooled >= MIN_POOL and is_idle(report)
