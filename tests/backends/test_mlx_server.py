"""The command line, the environment and the probes of mlx_lm.server."""

import sys
from functools import partial
from pathlib import Path

import pytest

from backends import mlx_server

plain = partial(mlx_server.argv, instrumented=False)


def flags(argv: tuple[str, ...]) -> list[str]:
    """What follows the fixed beginning."""
    model = ("server", "--model", "org/m", "--host", "{host}", "--port", "{port}")
    head = (sys.executable, "-P", "-m", "mlx_lm", *model)
    assert argv[: len(head)] == head
    return list(argv[len(head) :])


def test_the_defaults_keep_answers_whole_and_caches_bounded() -> None:
    sizes = ["--prompt-cache-bytes", "{prompt_cache_bytes}", "--prompt-cache-size", "{prompt_cache_size}"]
    assert flags(plain("org/m", {})) == ["--max-tokens", "8192", *sizes]
    assert mlx_server.cache_flags(plain("org/m", {})) == (True, True)


def test_a_size_of_the_prompt_cache_that_the_user_wrote_is_not_ours() -> None:
    bounded = plain("org/m", {"prompt-cache-bytes": "64MB"})
    assert "64MB" in bounded
    assert mlx_server.cache_flags(bounded) == (False, True)
    assert mlx_server.cache_flags(plain("org/m", {"prompt-cache-size": 3})) == (True, False)
    unbounded = plain("org/m", {"prompt-cache-bytes": None})
    assert "--prompt-cache-size" not in unbounded, "without a bound in bytes, more prompts would take more memory"


def test_the_operator_wins_over_the_defaults() -> None:
    assert flags(plain("org/m", {"max-tokens": 5, "prompt-cache-bytes": None})) == ["--max-tokens", "5"]


def test_flags_without_a_value_and_flags_left_out() -> None:
    given = {"max-tokens": None, "prompt-cache-bytes": False, "trust-remote-code": True, "pipeline": False, "temp": 0.0}
    assert flags(plain("org/m", given)) == ["--trust-remote-code", "--temp", "0.0"]


@pytest.mark.parametrize(
    ("decode", "prompt", "sent"),
    [(4, None, (4, 4)), (64, None, (64, 8)), (2, 6, (2, 6)), (None, 2, (None, 2)), (None, None, (None, None))],
)
def test_one_flag_for_decoding_bounds_the_batch(
    decode: int | None, prompt: int | None, sent: tuple[int | None, int | None]
) -> None:
    """The server takes the larger of the two, and 8 for prompts where nothing is said."""
    line = flags(plain("org/m", {"decode-concurrency": decode, "prompt-concurrency": prompt}))
    found = dict(zip(line[::2], line[1::2], strict=True))

    names = ("--decode-concurrency", "--prompt-concurrency")
    assert [found.get(name) for name in names] == [None if value is None else str(value) for value in sent]


def test_where_it_listens_is_filled_in_for_each_life() -> None:
    line = plain("org/m", {"host": "127.0.0.2", "port": 9000, "max-tokens": None, "prompt-cache-bytes": None})
    assert flags(line) == []
    assert all(isinstance(word, str) for word in line)


def test_the_instrument_runs_in_front_of_the_same_command() -> None:
    given = {"max-tokens": 5, "temp": 0.5}
    instrumented, without = plain("org/m", given, instrumented=True), plain("org/m", given)
    assert (instrumented[:2], instrumented[3:]) == (without[:2], without[4:])
    assert Path(instrumented[2]).is_file()


def test_the_environment() -> None:
    everywhere = mlx_server.environment(local_folder=False)
    assert everywhere["PYTHONUNBUFFERED"] == everywhere["PYTHONFAULTHANDLER"] == "1"
    assert "HF_HUB_OFFLINE" not in everywhere
    assert mlx_server.environment(local_folder=True) == {**everywhere, "HF_HUB_OFFLINE": "1"}
