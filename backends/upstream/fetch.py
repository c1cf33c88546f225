"""One complete answer of bounded size over any dialer: for probes and other small requests, not for client requests."""

import asyncio

from backends.upstream.exchange import Dialer, ExchangeError, Fault, Head, Request


async def fetch(
    dialer: Dialer,
    request: Request,
    *,
    limit: int = 1 << 20,
    timeout: float,  # noqa: ASYNC109  one ExchangeError for every failure, rather than a TimeoutError beside it
) -> tuple[Head, bytes]:
    """The head and a body of at most ``limit`` bytes. Raises ExchangeError; STALLED after ``timeout`` seconds, PROTOCOL
    for a larger body."""
    exchange = dialer.open(request)
    try:
        async with asyncio.timeout(timeout):
            head = await exchange.start()
            body = bytearray()
            while chunk := await exchange.read():
                body += chunk
                if len(body) > limit:
                    raise ExchangeError(Fault.PROTOCOL, f"an answer of more than {limit} bytes")
            return head, bytes(body)
    except TimeoutError as exc:
        raise ExchangeError(Fault.STALLED, f"no complete answer within {timeout:g} s") from exc
    finally:
        exchange.close()
