"""Frames of a traceback that carry the cause where its last line does not name it.

    under ``mx.distributed.init()``    distributed: a parse error there is one of the host file
    under ``AutoTokenizer.register()`` dependency: mlx-lm and transformers do not fit each other
    NSRangeException, metal::Device    native_crash: there is no Metal device (mlx before 0.31.2)

Pure: no I/O, no clock.
"""

import re
from dataclasses import dataclass

from backends.diagnosis.signature import Signature, Told, sig
from backends.domain.failure import Cause

MAX_FRAMES = 200  # lines of one traceback that are looked at

_INIT = sig(
    "under distributed.init",
    Cause.DISTRIBUTED,
    "mlx/distributed/ring/ring.cpp, jaccl: the host file is parsed there",
    told=Told(
        "it could not join its group of ranks",
        "Check the host file (valid JSON, one entry for each rank) and the variables MLX_HOSTFILE and MLX_RANK, then "
        "the links between the hosts; start all ranks again",
    ),
    precedes=True,
)
_REGISTER = sig(
    "under AutoTokenizer.register",
    Cause.DEPENDENCY,
    "mlx_lm/tokenizer_utils.py with transformers 5",
    told=Told(
        "its mlx-lm and its transformers do not fit each other",
        "Install versions that fit each other: update mlx-lm, or install the transformers that it was released with",
    ),
    precedes=True,
)
_DEVICE = sig(
    "NSRangeException in metal::Device",
    Cause.NATIVE_CRASH,
    "mlx#3397: the list of Metal devices is empty; a named error since 0.31.2",
    told=Told(
        "it found no Metal device",
        "Run it where the GPU can be used: not in a virtual machine, a sandbox or a session without a GPU",
    ),
    precedes=True,
)
_FRAMES = ((re.compile(r"\bdistributed\.init\("), _INIT), (re.compile(r"\bAutoTokenizer\.register\("), _REGISTER))
_METAL_DEVICE = re.compile(r"metal::Device\b|5metal6Device")
_OVERRULED = {  # causes that the last line of a traceback may suggest there
    _INIT.name: {Cause.LOAD_FAILURE, Cause.DOWNLOAD, Cause.MODEL_NOT_FOUND, Cause.PORT_IN_USE},
    _REGISTER.name: {Cause.LOAD_FAILURE},
}


@dataclass(slots=True)
class Frames:
    """The traceback that is being read, of Python (``_signature``: from its frames) or of Objective-C (``_ranged``)."""

    _left: int = 0  # lines that may still belong to it
    _signature: Signature | None = None
    _ranged: bool = False

    def note(self, line: str) -> None:
        """A line that may be a frame."""
        if "NSRangeException" in line:
            self._left, self._ranged = MAX_FRAMES, True
        elif line.startswith("Traceback (most recent call last)"):
            self._left, self._ranged, self._signature = MAX_FRAMES, False, None
        elif self._left:
            self._left -= 1
            if line[:1] == " " and "(" in line:
                self._signature = next((row for frame, row in _FRAMES if frame.search(line)), self._signature)

    def cause(self, line: str, row: Signature | None) -> Signature | None:
        """The signature for ``line``, for which the table has ``row``."""
        if self._ranged and self._left and _METAL_DEVICE.search(line):
            self._left, self._ranged = 0, False
            return _DEVICE
        if self._signature is None or line[:1].isspace() or not line or line.startswith("Traceback "):
            return row
        signature, self._signature, self._left = self._signature, None, 0
        return signature if row is None or row.cause in _OVERRULED[signature.name] else row
