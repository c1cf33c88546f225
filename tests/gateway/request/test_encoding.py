"""Compressed bodies: whole ones, broken ones and bombs."""

import gzip
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.errors import Code, RequestError
from gateway.request import BodyTooLarge, decoded

BODY = b'{"prompt": "hello"}' * 20


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


FORMS = {
    b"": BODY,
    b"identity": BODY,
    b"gzip": gzip.compress(BODY, mtime=0),
    b" GZip ": gzip.compress(BODY[:100]) + gzip.compress(BODY[100:]),
    b"x-gzip": gzip.compress(BODY, mtime=0),
    b"deflate": zlib.compress(BODY),
}


@pytest.mark.parametrize("encoding", FORMS)
def test_what_is_understood(encoding: bytes) -> None:
    assert decoded(FORMS[encoding], encoding, len(BODY)) == BODY


def test_deflate_without_its_header() -> None:
    assert decoded(raw_deflate(BODY), b"deflate", len(BODY)) == BODY


def code(body: bytes, encoding: bytes) -> Code:
    with pytest.raises(RequestError) as caught:
        decoded(body, encoding, 1000)
    error = caught.value.error
    told = dict(error.extra_headers).get(b"accept-encoding")
    assert told == (b"gzip, deflate" if error.code is Code.UNSUPPORTED_MEDIA_TYPE else None)
    return error.code


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, gzip", b"\xff" * 500])
def test_what_is_not(encoding: bytes) -> None:
    assert code(BODY, encoding) is Code.UNSUPPORTED_MEDIA_TYPE


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
@pytest.mark.parametrize(
    "body", [b"{}", gzip.compress(BODY, mtime=0)[:-1], gzip.compress(BODY, mtime=0) + b"rest", b"\x78"]
)
def test_what_is_broken(encoding: bytes, body: bytes) -> None:
    assert code(body, encoding) is Code.INVALID_REQUEST


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, raw_deflate])
def test_a_bomb_is_stopped_at_the_limit(pack: object) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000) if pack is gzip.compress else pack(b"\0" * 50_000_000)  # type: ignore[operator]
    encoding = b"gzip" if pack is gzip.compress else b"deflate"
    with pytest.raises(BodyTooLarge):
        decoded(bomb, encoding, 1000)
    with pytest.raises(BodyTooLarge):
        decoded(gzip.compress(b"a" * 600) * 2, b"gzip", 1000)


@given(st.binary(max_size=300), st.sampled_from([b"gzip", b"deflate"]))
def test_no_bytes_do_harm(body: bytes, encoding: bytes) -> None:
    with suppress(RequestError, BodyTooLarge):
        assert len(decoded(body, encoding, 1000)) <= 1000


@pytest.mark.parametrize(("encoding", "member"), [(b"deflate", b"\x03\x00"), (b"gzip", gzip.compress(b"", mtime=0))])
def test_a_body_of_empty_members_is_refused_at_once(encoding: bytes, member: bytes) -> None:
    """Each would cost a copy of the rest."""
    assert code(member * 200_000, encoding) is Code.INVALID_REQUEST
