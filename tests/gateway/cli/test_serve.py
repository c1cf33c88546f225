"""The limit on open files, on systems that allow less than they say."""

import resource

import pytest

from gateway.cli import serve

FREE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "most", "expected"),
    [
        (1024, 524288, FREE, 65536),
        (1024, 4096, FREE, 4096),
        (256, FREE, 10240, 10240),  # macOS refuses more than its own maximum, with a hard limit of infinity
        (256, FREE, 61440, 49152),
        (256, FREE, 24576, 24576),
        (256, 256, FREE, 256),
        (100_000, FREE, FREE, 100_000),
        (256, FREE, 200, 256),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_allowed(
    *, soft: int, hard: int, most: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [soft, hard]

    def set_limit(_: int, wanted: tuple[int, int]) -> None:
        if most != FREE and wanted[0] > most:
            raise ValueError("invalid argument")
        limits[:] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    serve._raise_descriptor_limit()
    assert limits == [expected, hard]
