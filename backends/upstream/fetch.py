"""One whole, bounded answer over any dialer: for probes and other small questions, not for requests of clients."""

import asyncio

from backends.upstream.exchange import Dialer, ExchangeError, Fault, Head, Request


async def fetch(
    dialer: Dialer,
    request: Request,
    *,
    limit: int = 1 << 20,
    timeout: float,  # noqa: ASYNC109  callers want one ExchangeError for everything, not a TimeoutError beside it
) -> tuple[Head, bytes]:
    """The head and at most ``limit`` bytes; ExchangeError(STALLED) if that took more than ``timeout`` seconds."""
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
        raise ExchangeError(Fault.STALLED, f"no whole answer within {timeout:g} s") from exc
    finally:
        exchange.close()
