"""uvicorn's HTTP/1.1, with one thing of ours: what it refuses by itself is told in the form of every other error."""

import logging
import uuid

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import errors
from gateway.errors import Code, GatewayError

log = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    def send_400_response(self, msg: str) -> None:
        """The bytes that came are no HTTP request: there is no scope, and no application to answer."""
        request_id = f"req_{uuid.uuid4().hex}"
        error = GatewayError(
            Code.INVALID_REQUEST, f"{msg.rstrip('.')}: not HTTP/1.1, or against its rules; mend the client"
        )
        body = errors.body(error, request_id)
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n"
            f"x-request-id: {request_id}\r\n\r\n"
        )
        log.info("malformed request", extra={"request_id": request_id, "status": 400})
        self.transport.write(head.encode() + body)
        self.transport.close()
