"""One row of the signature table.

Pure: no I/O, no clock.
"""

import re
from dataclasses import dataclass

from backends.domain.failure import Cause


@dataclass(frozen=True, slots=True)
class Signature:
    """``source``: file of mlx or mlx-lm with the versions that contain the text, or project#issue."""

    name: str
    cause: Cause
    source: str
    pattern: re.Pattern[str]
    faint: bool = False  # often recovers by itself: counts only if no other row matches


_NEVER = r"(?!)"


def sig(name: str, cause: Cause, source: str, *texts: str, faint: bool = False) -> Signature:
    """A row that matches where one of ``texts`` is found; without texts, a row that only code assigns."""
    return Signature(name, cause, source, re.compile("|".join(texts) or _NEVER), faint)
