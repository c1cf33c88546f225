"""How long a request may wait for a replica: in the queue, for a load, for a restart. Pure."""

CLIENT_MARGIN = 0.5  # seconds before the client's own timeout: a refusal has to reach it, or it sends the request again


def patience(
    queue_timeout: float, waited: float, *, deadline: float | None, client_deadline: float | None, now: float
) -> float:
    """Seconds that a request may wait from now on: the least of what is left of ``queue_timeout``, of the total
    deadline, and of the client's own timeout; may be negative. ``waited``: seconds that it has waited so far."""
    left = [queue_timeout - waited]
    if deadline is not None:
        left.append(deadline - now)
    if client_deadline is not None:
        left.append(client_deadline - CLIENT_MARGIN - now)
    return min(left)


def read_timeout(header: bytes) -> float | None:
    """The client's own timeout in seconds, as the SDKs of OpenAI and Anthropic send it (``x-stainless-read-timeout``,
    openai-python 2.54: "600"); None = it did not say."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        return None
    return seconds if 0.0 < seconds < 1e9 else None
