"""Names to models, and which model of a chain answers."""

from itertools import product

import pytest

from gateway.policy.routing import Prospect, Routes, choose

ROUTES = Routes(
    names={"big": "big", "gpt-4o": "big", "small": "small", "tiny": "tiny"},
    fallbacks={"big": ("small",), "small": ("tiny",), "tiny": ()},
)


@pytest.mark.parametrize(
    ("name", "model"),
    [("big", "big"), ("gpt-4o", "big"), ("tiny", "tiny"), ("nobody", None), ("BIG", None), ("", None)],
)
def test_a_name_or_an_alias(name: str, model: str | None) -> None:
    assert ROUTES.resolve(name) == model


def test_no_name_means_the_default_or_the_only_one() -> None:
    assert Routes({"default": "small", "big": "big"}, {}).resolve("") == "small"
    assert Routes({"big": "big", "gpt-4o": "big"}, {}).resolve("") == "big"
    assert Routes({}, {}).resolve("") is None


def test_the_chain_follows_no_fallback_of_a_fallback() -> None:
    assert ROUTES.chain("big") == ("big", "small")
    assert ROUTES.chain("tiny") == ("tiny",)
    assert ROUTES.chain("unlisted") == ("unlisted",)


def test_the_best_prospect_and_of_equals_the_first() -> None:
    for one, two, three in product(Prospect, repeat=3):
        chain = {"a": one, "b": two, "c": three}
        chosen = choose(tuple(chain), chain.__getitem__)
        order = (Prospect.READY, Prospect.STARTING, Prospect.RETURNING)
        best = [name for kind in order for name, prospect in chain.items() if prospect is kind]
        assert chosen == ([*best, None])[0]


def test_an_empty_chain() -> None:
    assert choose((), lambda _: Prospect.READY) is None


def test_every_prospect_is_asked_once() -> None:
    asked: list[str] = []

    def prospect(name: str) -> Prospect:
        asked.append(name)
        return Prospect.STARTING

    assert choose(("a", "b"), prospect) == "a"
    assert asked == ["a", "b"]
