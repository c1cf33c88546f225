"""Bodies that come compressed: gzip and deflate, decoded within the bound of the body. Pure.

Caveat: a decompression bomb is a few kilobytes that become gigabytes, or thousands of empty members, each of which
costs a copy of the rest. Decoding stops at the first byte beyond the limit, and after a few members.
"""

import zlib

from gateway.api.errors import Code, GatewayError, RequestError

GZIP = 16 + zlib.MAX_WBITS
FORMS = {b"gzip": GZIP, b"x-gzip": GZIP, b"deflate": zlib.MAX_WBITS}
MOST_INFLATED = 1032  # bytes that deflate makes of one, at most
PLAIN = (b"", b"identity")
MAX_MEMBERS = 16  # of gzip; deflate has one


class BodyTooLarge(Exception):
    """It decodes to more than the limit."""


def decoded(body: bytes, encoding: bytes, limit: int) -> bytes:
    """``encoding`` as in the header Content-Encoding. Raises RequestError, BodyTooLarge."""
    name = encoding.strip().lower()
    if name in PLAIN:
        return body
    if name not in FORMS:
        message = (
            f"content-encoding {encoding.decode('latin-1')[:100]!r} is not understood; send the body as it is, or as "
            "gzip or deflate"
        )
        accepted = ((b"accept-encoding", b"gzip, deflate"),)  # RFC 9110, 15.5.16
        raise RequestError(GatewayError(Code.UNSUPPORTED_MEDIA_TYPE, message, extra_headers=accepted))
    try:
        return _inflated(body, FORMS[name], limit)
    except zlib.error as error:
        message = f"the body is not {name.decode()}, as its content-encoding says: {error}"
        raise RequestError(GatewayError(Code.INVALID_REQUEST, message)) from None


def _inflated(body: bytes, form: int, limit: int) -> bytes:
    """All members: gzip files may be put one after the other. Raises zlib.error, BodyTooLarge."""
    out: list[bytes] = []
    room = limit
    if form == zlib.MAX_WBITS and body and body[0] & 0x0F != zlib.DEFLATED:
        form = -zlib.MAX_WBITS  # "deflate" without its zlib header, as many clients send it
    members = MAX_MEMBERS if form == GZIP else 1
    while body:
        if not members:
            raise zlib.error("something follows its end")
        members -= 1
        member = zlib.decompressobj(form)
        out.append(member.decompress(body, room + 1))
        room -= len(out[-1])
        if room < 0:
            raise BodyTooLarge
        if not member.eof:
            raise zlib.error("it is cut short")
        body = member.unused_data
    return out[0] if len(out) == 1 else b"".join(out)
