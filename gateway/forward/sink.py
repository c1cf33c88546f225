"""The protocol of an answer's destination."""

from collections.abc import Callable
from typing import Protocol

from gateway.api.errors import GatewayError

Header = tuple[bytes, bytes]


class Sink(Protocol):
    """The destination of an answer: the client connection, or one branch of a fan-out."""

    request_id: str
    extra: list[Header]

    @property
    def headers_sent(self) -> bool: ...

    @property
    def ready(self) -> bool:
        """The answer has begun, and pushed data is sent at once."""
        ...

    async def write(self, data: bytes) -> None: ...

    def push(self, data: bytes) -> None:
        """``write`` without waiting; only while ``ready``."""
        ...

    def waits(self, told: Callable[[], str]) -> Callable[[], None]:
        """The request waits: the client of a stream is sent the line that ``told`` gives, as a comment, now and then.
        Returns the function that ends that."""
        ...

    async def finish(self) -> None: ...

    async def answer(self, status: int, body: bytes) -> None: ...

    async def fail(self, error: GatewayError) -> None: ...
