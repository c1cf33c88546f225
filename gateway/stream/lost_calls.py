"""Tool calls that an answer claims, or began, and does not have.

    finish_reason "tool_calls", no call      the server could not read what the model wrote (``interpreter``)
    "length", no call, no text of N tokens   mlx_lm.server: the call was cut off by max_tokens, and withheld
    "length", no call, tokens without text   perhaps so: the server's log says whether it dropped a call
    a chunk without anything in it           mlx_lm.server writes one only where it has dropped the call that was in it
    a call, and the log says one was dropped perhaps this answer's, perhaps another's: counts where it was alone
    text that ends inside tool markup        the server does not read these calls, and the markup is not closed

mlx_lm.server (0.31.3 to 0.32.2) withholds the text between the markers of its tool parser; a call that the parser
refuses is dropped with a warning in the log. The log does not say whose call that was, so it alone is never enough.

Caveat: people talk about tool markup, and models write examples of it. Markup in the text counts only where tools were
asked for, at the beginning of a line, outside of code, and followed by the beginning of a call; a server that knows the
markers never lets them through as text. The thoughts of a model do not count.

Pure: no I/O, no clock.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto

CLAIMS_CALL = frozenset({"tool_calls", "tool_call", "function_call", "tool_use"})
CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})

MIN_WITHHELD = 8  # tokens without any text; fewer may be a character that was not finished
MAX_TEXTS = 1 << 17  # chunks of text that are kept to be looked at
MAX_TEXT_CHARS = 1 << 22  # characters of them

# The beginning of a call in the formats of mlx_lm/tool_parsers (0.32.2) that have an end, and the end.
_MARKUP = (
    (r"<tool_call>\s*(?:\{|<function=|[\w.-]+\s*<arg_key>)", "</tool_call>"),
    (r"<function=[\w.-]+>", "</function>"),
    (r"<\|tool_call_start\|>\s*\[", "<|tool_call_end|>"),
    (r"<\|tool_call>\s*call:", "<tool_call|>"),
    (r"<start_function_call>\s*call:", "<end_function_call>"),
    (r"<longcat_tool_call>", "</longcat_tool_call>"),
    (r"<minimax:tool_call>\s*<invoke", "</minimax:tool_call>"),
    (r"<\|tool_calls_section_begin\|>", "<|tool_calls_section_end|>"),
)
_ENDS = {f"m{i}": end for i, (_, end) in enumerate(_MARKUP)}
_BEGINS = re.compile(
    r"^[ \t]*(?:" + "|".join(f"(?P<m{i}>{begin})" for i, (begin, _) in enumerate(_MARKUP)) + ")", re.MULTILINE
)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Ending:
    """What an answer shows of its tool calls. ``calls``: it has one. ``withheld``: tokens that no text came of, None
    where the upstream did not count them; ``said``: any text came; ``markup``: its text ends inside a tool call;
    ``hollow``: a chunk after the first had nothing in it, not even a finish_reason."""

    finish_reason: str | None = None
    calls: bool = False
    withheld: int | None = None
    said: bool = False
    markup: bool = False
    hollow: bool = False

    @property
    def cut(self) -> bool:
        return self.finish_reason in CUT


class Doubt(Enum):
    NONE = auto()
    LOST = auto()  # a call is not there
    ASK_LOG = auto()  # it is not there, if the server has dropped a call at this moment
    ASK_LOG_IF_ALONE = auto()  # the same, where no other request was in flight


def doubt(ending: Ending, *, is_mlx: bool) -> Doubt:
    """Of an answer that is complete, to a request that asked for tools. ``is_mlx``: of mlx_lm.server."""
    if ending.hollow and is_mlx:
        return Doubt.LOST
    if ending.calls:
        return Doubt.ASK_LOG_IF_ALONE
    if ending.markup:
        return Doubt.LOST
    if not ending.cut:
        return Doubt.NONE
    if not ending.said and (ending.withheld or 0) >= MIN_WITHHELD:
        return Doubt.LOST if is_mlx else Doubt.NONE  # other servers may hide thoughts
    # The last token of an answer that was cut may be half a character.
    return Doubt.ASK_LOG if ending.withheld is None or ending.withheld > 1 else Doubt.NONE


def cut_off(ending: Ending) -> bool:
    """Whether the call that is missing was ended by the limit on tokens, not by what the model wrote."""
    if not ending.cut or ending.hollow:
        return False
    return ending.markup or not ending.calls or (ending.withheld or 0) > 1


def ends_in_markup(text: str) -> bool:
    """Time linear in the length of the text."""
    last = None
    for last in _BEGINS.finditer(text):  # noqa: B007 — the last one is wanted
        pass
    if last is None or last.lastgroup is None or _ENDS[last.lastgroup] in text[last.end() :]:
        return False
    return len(_FENCE.findall(text, 0, last.start())) % 2 == 0
