"""Failures of calls, for tests of what follows from them."""

from dataclasses import fields, replace
from typing import Any

from backends.domain.failure import Aftermath, CallFailure, Cause, Failure, UpstreamReport

_OF_CALL = {field.name for field in fields(CallFailure)}
_OF_UPSTREAM = {field.name for field in fields(UpstreamReport)}


def call_failure(cause: Cause, aftermath: Aftermath, message: str, **more: Any) -> CallFailure:
    """``more``: fields of the call, of what an upstream said, and of the verdict."""
    return changed(CallFailure(Failure(cause, aftermath, message)), **more)


def changed(failure: CallFailure, **more: Any) -> CallFailure:
    call = {name: more.pop(name) for name in _OF_CALL & set(more)}
    said = {name: more.pop(name) for name in _OF_UPSTREAM & set(more)}
    return replace(
        failure, verdict=replace(failure.verdict, **more), upstream=replace(failure.upstream, **said), **call
    )
