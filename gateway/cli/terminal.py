"""Texts that others wrote, made safe to print: a terminal obeys the escape sequences in them. Pure.

A line of backend output may quote a request, and then hold sequences that rewrite what is on the screen, set the title,
or make the terminal type an answer.
"""

import re

# Control characters but tab and newline (C0, DEL, C1: U+009B alone begins a sequence); marks and overrides of the
# writing direction, which reorder a line; line separators; lone surrogates, which cannot be printed.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""``text`` with unsafe characters written as ``\x1b`` or ``\u202e``; tabs and newlines stay."""
    return _UNSAFE.sub(_escaped, text)


def printable_json(text: str) -> str:
    """The same for JSON: it stays JSON of the same value."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
