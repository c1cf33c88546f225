"""One text in, one value out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import parsers
from gateway.config.problems import Unfit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("10m", 600), ("2h", 7200), ("1.5s", 1.5), ("0", 0), ("0.25", 0.25), ("90", 90)],
)
def test_duration(text: str, seconds: float) -> None:
    assert parsers.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1:30", "1d", "1m30s", "inf", ".inf", "nan", "1e3", "1_000", "٣s"])
def test_not_a_duration(text: str) -> None:
    with pytest.raises(Unfit):
        parsers.duration(text)


@given(st.integers(0, 10**9), st.sampled_from([("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)]))
def test_durations_round_trip(count: int, unit: tuple[str, int]) -> None:
    assert round(parsers.duration(f"{count}{unit[0]}") * 1000) == count * unit[1]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1024", 1024),
        ("12B", 12),
        ("1K", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 * 2**20),
        ("8GB", 8 * 10**9),
        ("4G", 4 * 10**9),
        ("4Gi", 4 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("2 TiB", 2 * 2**40),
    ],
)
def test_size(text: str, count: int) -> None:
    assert parsers.size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1", "1.5", "1iB", "1XB", "1e3", "8 G B", "inf", "0x10"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(Unfit):
        parsers.size(text)


@given(st.integers(0, 10**15), st.sampled_from("KMGT"), st.sampled_from(["", "B", "i", "iB"]), st.booleans())
def test_sizes_round_trip(count: int, letter: str, rest: str, lower: bool) -> None:
    base = 1024 if "i" in rest else 1000
    text = f"{count}{letter}{rest}"
    assert parsers.size(text.lower() if lower else text) == count * base ** ("KMGT".index(letter) + 1)


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("80%", "80%"), ("100 %", "100%"), ("48GiB", 48 * 2**30), ("5", 5)]
)
def test_budget(text: str, value: str | int) -> None:
    assert parsers.budget(text) == value


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "most", "%", "AUTO"])
def test_not_a_budget(text: str) -> None:
    with pytest.raises(Unfit):
        parsers.budget(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-7", -7), ("8_080", 8080), ("1.5", 1.5), ("1e-3", 0.001), (".5", 0.5), ("1.", 1.0), ("+3", 3)],
)
def test_number(text: str, value: float) -> None:
    found = parsers.number(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["", "010", "0x10", "1:30", "inf", ".nan", "1 2", "--1", "1__0", "٣", "8080\n"])
def test_not_a_number(text: str) -> None:
    assert parsers.number(text) is None


def test_a_number_too_long_to_hold_is_infinite() -> None:
    assert parsers.number("9" * 5000) == math.inf
    assert parsers.number("-" + "9" * 5000) == -math.inf


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30))
def test_numbers_round_trip(value: float) -> None:
    assert parsers.number(repr(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("${A}", "one"),
        ("x${A}y${B}z", "xoneytwoz"),
        ("${A:-other}", "one"),
        ("${NONE:-other}", "other"),
        ("${EMPTY:-other}", "other"),
        ("${EMPTY}", ""),
        ("${NONE:-}", ""),
        ("${NONE:-a:-b}", "a:-b"),
        ("$${A}", "${A}"),
        ("$A $$ $", "$A $$ $"),
        ("${NESTED}", "${A}"),
    ],
)
def test_substitute(text: str, value: str) -> None:
    environ = {"A": "one", "B": "two", "EMPTY": "", "NESTED": "${A}"}
    assert parsers.substitute(text, environ) == value


@pytest.mark.parametrize("text", ["${", "${A", "${}", "${1A}", "${A B}", "${A-b}", "${A:-${B}}", "${:-x}"])
def test_malformed_variables(text: str) -> None:
    with pytest.raises(Unfit) as caught:
        parsers.substitute(text, {"A": "one", "B": "two"})
    assert caught.value.expected == "${NAME} or ${NAME:-default}"


def test_an_unset_variable_is_named() -> None:
    with pytest.raises(Unfit) as caught:
        parsers.substitute("x ${MISSING}", {})
    assert "MISSING" in caught.value.expected
    assert "${MISSING:-" in caught.value.remedy


@given(st.text(alphabet="ab$ {:-", max_size=12).filter(lambda text: "${" not in text))
def test_text_without_variables_stays(text: str) -> None:
    assert parsers.substitute(text, {}) == text


@given(st.text(max_size=12).filter(lambda text: "}" not in text and "${" not in text))
def test_any_default_comes_out_and_any_escape_is_literal(text: str) -> None:
    assert parsers.substitute(f"<${{X:-{text}}}>", {}) == f"<{text}>"
    assert parsers.substitute(f"$${{{text}}}", {}) == f"${{{text}}}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("http://studio.local:8080", "http://studio.local:8080"),
        ("http://studio.local:8080/", "http://studio.local:8080"),
        ("https://h/v1", "https://h"),
        ("https://h/v1/", "https://h"),
        ("https://h/api/v1//", "https://h/api"),
        ("http://H:80", "http://h:80"),
        ("http://[::1]:80/v1", "http://[::1]:80"),
        ("http://h/xv1", "http://h/xv1"),
    ],
)
def test_url(text: str, value: str) -> None:
    assert parsers.url(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "h:80", "//h", "ftp://h", "http://", "http://h:0", "http://h:99999", "http://h:x", "http://u:p@h", "http://u@h",
        "http://h?x", "http://h#", "http://h /", "http://[::1", "http://ho\tst", "http://häst", "http://a,b",
    ],
)  # fmt: skip
def test_not_a_url(text: str) -> None:
    with pytest.raises(Unfit):
        parsers.url(text)


@pytest.mark.parametrize(
    "text", ["auto", "direct", "http://proxy:3128", "https://me:pw@proxy.example", "socks5://[::1]:9"]
)
def test_proxy(text: str) -> None:
    assert parsers.proxy(text) == text


@pytest.mark.parametrize("text", ["", "proxy:3128", "ftp://me:secret@proxy", "http://", "http://proxy:0", "http://p:x"])
def test_not_a_proxy(text: str) -> None:
    with pytest.raises(Unfit) as caught:
        parsers.proxy(text)
    assert "secret" not in str(vars(caught.value))


@pytest.mark.parametrize("text", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST.", "::ffff:127.0.0.1"])
def test_loopback(text: str) -> None:
    assert parsers.is_loopback(text)


@pytest.mark.parametrize("text", ["0.0.0.1", "::", "192.168.1.2", "localhost.example", "::ffff:10.0.0.1", "128.0.0.1"])
def test_not_loopback(text: str) -> None:
    assert not parsers.is_loopback(text)


@pytest.mark.parametrize("text", ["0.0.0.0:8080", "http://h", "a b", "", "[::1]", "a/b", "-a"])
def test_not_a_host(text: str) -> None:
    with pytest.raises(Unfit):
        parsers.host(text)


@pytest.mark.parametrize(
    "text", ["*", "https://a.example", "http://localhost:3000", "app://obsidian.md", "http://[::1]:5"]
)
def test_cors_origin(text: str) -> None:
    assert parsers.cors_origin(text) == text


@pytest.mark.parametrize("text", ["https://a.example/", "a.example", "https://A.example", "https://*", "null", ""])
def test_not_a_cors_origin(text: str) -> None:
    with pytest.raises(Unfit):
        parsers.cors_origin(text)


@pytest.mark.parametrize(
    ("text", "value"), [("4GB", "4GB"), ("4 gb", "4 gb"), ("1.5G", "1.5G"), ("12", 12), ("4GiB", 2**32)]
)
def test_sizes_that_the_server_cannot_read_become_bytes(text: str, value: str | int) -> None:
    assert parsers.mlx_size(text) == value


@pytest.mark.parametrize(
    ("word", "found"), [("max_token", "max-tokens"), ("Max-Tokens", "max-tokens"), ("zzz", None), ("", None)]
)
def test_nearest(word: str, found: str | None) -> None:
    assert parsers.nearest(word, ["max-tokens", "top-k"]) == found
