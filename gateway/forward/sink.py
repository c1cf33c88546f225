"""The protocol of what an answer is written to."""

from collections.abc import Sequence
from typing import Protocol

from gateway.api.errors import GatewayError

Header = tuple[bytes, bytes]


class Sink(Protocol):
    """What an answer is written to: the client, or one part of its answer."""

    request_id: str
    extra: list[Header]

    @property
    def headers_sent(self) -> bool: ...

    @property
    def ready(self) -> bool:
        """The answer is under way, and what is pushed now goes out at once."""
        ...

    async def write(self, data: bytes) -> None: ...

    def push(self, data: bytes) -> None:
        """``write`` without waiting; only while ``ready``."""
        ...

    async def finish(self) -> None: ...

    async def answer(self, status: int, body: bytes, headers: Sequence[Header] = ()) -> None: ...

    async def fail(self, error: GatewayError) -> None: ...
