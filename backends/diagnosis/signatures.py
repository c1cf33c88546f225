"""The signature table: which text means which cause. The first row that matches, in table order, wins.

The order matters: a specific cause inside a traceback must beat the wrapper around it ("generation thread died",
"terminating due to"), and a guess from a stack frame must lose to every row that names a cause.

Elsewhere: ``log_parser`` removes text that a client can write into the log before any row is tried; ``verdict`` weighs
exit statuses and probes. Here are texts only, each with its source.

Every pattern is searched, not anchored to the start of a line (a progress bar may precede it), and contains no nested
or adjacent unbounded repeats: time is linear in the length of the line. Every alternative contains a literal of at
least 4 characters, so that ``match`` can rule out most rows without trying their patterns (``literals``).

Pure: no I/O, no clock.
"""

from backends.diagnosis.literals import MIN_LITERAL_CHARS, literals
from backends.diagnosis.signature import Signature, Told, sig
from backends.diagnosis.signatures_gpu import GPU_ROWS
from backends.diagnosis.signatures_process import PROCESS_ROWS
from backends.diagnosis.signatures_start import START_ROWS
from backends.domain.failure import Cause

_REQUEST_ROWS: tuple[Signature, ...] = (
    sig(
        "client gone",
        Cause.CLIENT_GONE,
        "socketserver.py, all versions",
        r"\b(?:BrokenPipeError|ConnectionResetError|ConnectionAbortedError)\b",
    ),
    sig("not JSON", Cause.BAD_REQUEST, "mlx_lm/server.py ≥0.28.4", r"JSONDecodeError: [^\n]{0,200} - Raw body:"),
    sig("not an object", Cause.BAD_REQUEST, "mlx_lm/server.py, all versions", r"Invalid Request Body:"),
)

_FAINT_ROWS: tuple[Signature, ...] = (
    sig(
        "peer not there yet",
        Cause.DISTRIBUTED,
        "ring.cpp with MLX_RING_VERBOSE; jaccl/rdma.cpp",
        r"\[ring\] (?:Rank \d+ )?Attempt \d+ wait|\[jaccl\] Connection attempt \d+",
        faint=True,
        told=Told(
            "it waits for another rank of its group",
            "Nothing yet: it goes on trying. If the other rank runs, check the links between the hosts",
        ),
    ),
)

SIGNATURES: tuple[Signature, ...] = (*GPU_ROWS, *START_ROWS, *PROCESS_ROWS, *_REQUEST_ROWS, *_FAINT_ROWS)

_ROW = {signature.name: row for row, signature in enumerate(SIGNATURES)}
_FIRST_ROW = {signature.cause: row for row, signature in reversed(list(enumerate(SIGNATURES)))}
_LAST_ROW = {signature.cause: row for row, signature in enumerate(SIGNATURES)}


def rank(signature: Signature) -> tuple[bool, float]:
    """Smaller is better. A signature outside the table (from an answer, say) ranks as the first row of its cause; a
    status, after the last; one from the frames of a traceback, before all."""
    if signature.precedes:
        return False, -1
    if signature.name.startswith("status "):
        return signature.faint, _LAST_ROW.get(signature.cause, len(SIGNATURES)) + 0.5
    return signature.faint, _ROW.get(signature.name, _FIRST_ROW.get(signature.cause, len(SIGNATURES)))


# Causes of a request's error that lie in the GPU, the allocator, a peer or the disk, not in the request's content.
NATIVE = frozenset(
    {
        Cause.OOM, Cause.RESOURCE_LIMIT, Cause.GPU_TIMEOUT, Cause.GPU_VICTIM, Cause.GPU_FAULT,
        Cause.DISTRIBUTED, Cause.DISK_FULL, Cause.WEDGE, Cause.DEPENDENCY,
    }
)  # fmt: skip


SEARCHED_CHARS = 600  # of a line, from its start and from its end


def _by_piece() -> dict[str, list[tuple[str, int]]]:
    """The literals of all rows, with the row, by their first ``MIN_LITERAL_CHARS`` characters."""
    rows: dict[str, list[tuple[str, int]]] = {}
    for row, signature in enumerate(SIGNATURES):
        for text in literals(signature.pattern.pattern):
            rows.setdefault(text[:MIN_LITERAL_CHARS], []).append((text, row))
    return rows


_BY_PIECE = _by_piece()
_PIECES = frozenset(_BY_PIECE)


def match(line: str) -> Signature | None:
    """The first matching row, or None. Patterns are tried only where one of their literals is in the line."""
    if len(line) > 2 * SEARCHED_CHARS:
        line = f"{line[:SEARCHED_CHARS]} {line[-SEARCHED_CHARS:]}"
    pieces = {line[at : at + MIN_LITERAL_CHARS] for at in range(len(line) - MIN_LITERAL_CHARS + 1)}
    rows = {row for piece in pieces & _PIECES for text, row in _BY_PIECE[piece] if text in line}
    return next((SIGNATURES[row] for row in sorted(rows) if SIGNATURES[row].pattern.search(line)), None)
