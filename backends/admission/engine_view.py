"""The members of a batch as the engine tells them, where it holds more than the gateway knows of.

A request that was given up may still be at work; others may have been sent past the gateway; of a tool call nothing is
streamed while it grows, and an estimated prompt may be longer than was thought. What the engine does not tell yet, as a
request that was just sent, is as the gateway knows it.

Pure.
"""

from collections.abc import Sequence
from dataclasses import replace

from backends.admission.batch import MORE, Member, likely_beyond
from backends.domain.report import EngineReport


def corrected(members: Sequence[Member], report: EngineReport | None) -> list[Member]:
    """The engine tells the number of its members and the tokens of the longest alone: one that the gateway does not
    know of may be that one; if there is none, it is the one that was the longest as far as was known."""
    ours = list(members)
    if report is None or report.reading is None or report.decoding is None or not report.longest:
        return ours
    unknown = report.reading + report.decoding - len(ours)
    if unknown > 0:
        return [*ours, *[Member(report.longest, MORE, report.longest, decoding=True)] * unknown]
    more = report.longest - max((_known(member) for member in ours), default=report.longest)
    if more > 0:
        index = max(range(len(ours)), key=lambda each: _known(ours[each]))
        ours[index] = _longer(ours[index], more)
    return ours


def _known(member: Member) -> int:
    """Its whole prompt and what it has written, as the engine counts."""
    return member.prompt + member.written


def _longer(member: Member, more: int) -> Member:
    if member.decoding:
        written = member.written + more
        return replace(member, written=written, likely=likely_beyond(written, member.likely))
    return replace(member, prompt=member.prompt + more)
