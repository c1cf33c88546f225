"""The command line, the environment and the probes of mlx_lm.server."""

import sys

from backends import mlx_server


def flags(argv: tuple[str, ...]) -> list[str]:
    """What follows the fixed beginning."""
    head = (sys.executable, "-P", "-m", "mlx_lm", "server", "--model", "org/m", "--host", "{host}", "--port", "{port}")
    assert argv[: len(head)] == head
    return list(argv[len(head) :])


def test_the_defaults_keep_answers_whole_and_caches_bounded() -> None:
    assert flags(mlx_server.argv("org/m", {})) == ["--max-tokens", "8192", "--prompt-cache-bytes", "4GB"]


def test_the_operator_wins_over_the_defaults() -> None:
    assert flags(mlx_server.argv("org/m", {"max-tokens": 5, "prompt-cache-bytes": None})) == ["--max-tokens", "5"]


def test_flags_without_a_value_and_flags_left_out() -> None:
    given = {"max-tokens": None, "prompt-cache-bytes": False, "trust-remote-code": True, "pipeline": False, "temp": 0.0}
    assert flags(mlx_server.argv("org/m", given)) == ["--trust-remote-code", "--temp", "0.0"]


def test_where_it_listens_is_filled_in_for_each_life() -> None:
    line = mlx_server.argv("org/m", {"host": "127.0.0.2", "port": 9000, "max-tokens": None, "prompt-cache-bytes": None})
    assert flags(line) == []
    assert all(isinstance(word, str) for word in line)


def test_the_environment() -> None:
    everywhere = mlx_server.environment(local_folder=False)
    assert everywhere["PYTHONUNBUFFERED"] == everywhere["PYTHONFAULTHANDLER"] == "1"
    assert "HF_HUB_OFFLINE" not in everywhere
    assert mlx_server.environment(local_folder=True) == {**everywhere, "HF_HUB_OFFLINE": "1"}
