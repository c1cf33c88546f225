"""One row of the signature table.

Pure: no I/O, no clock.
"""

import re
from dataclasses import dataclass

from backends.domain.failure import Cause, Reason


@dataclass(frozen=True, slots=True)
class Told:
    """What a row tells of its cause in place of the general texts (``messages``)."""

    message: str
    advice: str
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    """``source``: file of mlx or mlx-lm with the versions that contain the text, or project#issue."""

    name: str
    cause: Cause
    source: str
    pattern: re.Pattern[str]
    faint: bool = False  # often recovers by itself: counts only if no other row matches
    told: Told | None = None
    precedes: bool = False  # more exact than any row of the table


_NEVER = r"(?!)"


def sig(
    name: str,
    cause: Cause,
    source: str,
    *texts: str,
    faint: bool = False,
    told: Told | None = None,
    precedes: bool = False,
) -> Signature:
    """A row that matches where one of ``texts`` is found; without texts, a row that only code assigns."""
    return Signature(name, cause, source, re.compile("|".join(texts) or _NEVER), faint, told, precedes)
