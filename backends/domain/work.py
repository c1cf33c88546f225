"""What one request asks of its backend, as far as it is known before it is sent. Pure: no I/O, no clock."""

from typing import NamedTuple


class Work(NamedTuple):
    """``max_tokens``: of the answer; 0 = not known; ``likely_tokens``: that few of such answers exceed. ``one_piece``:
    the answer comes in one piece at its end, so silence before that is no sign of a stall. ``tools``: it may call some;
    mlx_lm.server writes nothing while the model generates a call."""

    prompt_tokens: int = 0
    max_tokens: int = 0
    likely_tokens: int = 0
    one_piece: bool = False
    tools: bool = False


NO_WORK = Work()
