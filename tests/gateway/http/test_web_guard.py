"""Which requests of web pages are refused, and by what."""

import pytest

from gateway.api.errors import Code, GatewayError
from gateway.http.web_guard import WebGuard

ORIGINS = ("https://good.example", "app://obsidian.md")


def refusal(guard: WebGuard, method: str = "POST", **headers: str) -> GatewayError | None:
    return guard.refusal(method, [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()])


@pytest.mark.parametrize(
    "host",
    [
        *["127.0.0.1", "127.0.0.1:8080", "127.8.9.1", "[::1]", "[::1]:8080", "[::ffff:127.0.0.1]:80", "localhost"],
        *["LOCALHOST:8080", "localhost.", "localhost.:8080", "tiny.localhost:1", "localhost:", "", " localhost "],
        *["0.0.0.0:8080", "[::]:8080"],
        *["studio.ts.net", "Studio.TS.net.:443", "192.168.1.5:8080", "[fe80::1]:80"],
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_host_that_is_ours(host: str, method: str) -> None:
    guard = WebGuard(has_keys=False, hosts=["studio.ts.net.", "192.168.1.5", "fe80::1"])
    assert refusal(guard, method, host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        *["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.6"],
        *["evil.example@localhost", "localhost@evil.example", "localhost:80@evil.example", "localhost,evil.example"],
        *[
            "[::1",
            "::1",
            "[::1]x",
            "[::2]",
            "localhost:port",
            "localhost:999999",
            "localhost/evil",
            "evil\x1blocalhost",
        ],
        *["xlocalhost", "10.0.0.1", "studio.ts.net.evil.example", "evil.studio.ts.net", "é"],
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
def test_another_host(host: str, method: str) -> None:
    guard = WebGuard(has_keys=False, origins=["*"], hosts=["studio.ts.net"])
    error = refusal(guard, method, host=host)
    assert error is not None
    assert (error.status, error.code) == (421, Code.FORBIDDEN_ORIGIN)
    assert "server.allowed_hosts" in error.message
    assert error.message.isprintable()


def test_the_second_of_two_hosts_counts_too() -> None:
    headers = [(b"host", b"localhost"), (b"host", b"evil.example")]
    assert WebGuard(has_keys=False).refusal("GET", headers) is not None


def test_no_host_at_all() -> None:
    assert refusal(WebGuard(has_keys=False)) is None


def test_with_keys_the_host_counts_only_where_names_are_listed() -> None:
    assert refusal(WebGuard(has_keys=True), host="evil.example") is None
    listed = WebGuard(has_keys=True, hosts=["studio.ts.net"])
    assert refusal(listed, host="evil.example") is not None
    assert refusal(listed, host="studio.ts.net") is None
    assert refusal(listed, host="127.0.0.1") is None


@pytest.mark.parametrize(
    "origin",
    [
        *["https://evil.example", "http://evil.example:8080", "http://127.0.0.1.evil.example", "http://[bad", "null"],
        *["NULL", "file://", "vscode-webview://abc", "chrome-extension://abc", "blob:http://localhost", "evil", " "],
        *["app://obsidian.md.evil", "HTTPS://good.example", "https://good.example/", "ftp://localhost", "//localhost"],
        *["https://localhost.evil.example", "https://evil.example@x", "data:text/html,x", "about:blank"],
    ],
)
def test_a_page_of_another_site(origin: str) -> None:
    guard = WebGuard(has_keys=False, origins=ORIGINS)
    error = refusal(guard, host="localhost", origin=origin)
    assert error is not None
    assert (error.status, error.code) == (403, Code.FORBIDDEN_ORIGIN)
    assert "server.api_keys" in error.message
    assert refusal(guard, "GET", host="localhost", origin=origin) is None, "the browser hides the answer"
    assert refusal(WebGuard(has_keys=True, origins=ORIGINS), origin=origin) is None, "the page has no key"
    assert refusal(WebGuard(has_keys=False, origins=["*"]), origin=origin) is None


@pytest.mark.parametrize(
    "origin",
    [
        *ORIGINS,
        "http://localhost:3000",
        "https://127.0.0.1",
        "http://[::1]:8080",
        "http://a.localhost",
        "https://me.ts",
    ],
)
@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin"])
def test_a_page_that_may(origin: str, site: str) -> None:
    guard = WebGuard(has_keys=False, origins=ORIGINS, hosts=["me.ts"])
    assert refusal(guard, origin=origin, sec_fetch_site=site) is None


@pytest.mark.parametrize(("site", "refused"), [("cross-site", True), ("Cross-Site ", True), ("none", False)])
def test_a_page_without_an_origin(site: str, refused: bool) -> None:
    guard = WebGuard(has_keys=False)
    assert (refusal(guard, sec_fetch_site=site) is not None) is refused
    assert refusal(guard, "GET", sec_fetch_site=site) is None
