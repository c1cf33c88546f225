"""The class of a request: that of its model, which the header ``x-priority`` may lower and not raise. Pure."""

from backends.domain.priority import Priority
from gateway.api.errors import Code, GatewayError, RequestError

HEADER = "x-priority"
_NAMES = ", ".join(priority.label for priority in Priority)


def priority_of(header: bytes, model: Priority) -> tuple[Priority, str]:
    """The class, and a warning where a more urgent one was asked for. ``header``: b"" if absent; ``model``: the class
    of its requests. Raises RequestError for a class that there is not: taken for another one, the request would be in
    the way of others, or late, and nobody would know why."""
    name = header.decode("ascii", "replace").strip() if header else ""
    if not name:
        return model, ""
    try:
        asked = Priority.of(name)
    except KeyError:
        message = f"the header {HEADER}: expected one of {_NAMES}, got {name[:40]!r}; correct it or leave it out"
        raise RequestError(GatewayError(Code.INVALID_REQUEST, message, param=HEADER)) from None
    if asked >= model:
        return asked, ""
    return model, f"{HEADER}: {asked.label} is more urgent than the model's priority, {model.label}, which holds"
