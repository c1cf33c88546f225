"""How much text one token can stand for: never said to be less than it is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from gateway.api.json_codec import loads
from gateway.policy.token_bound import BYTES, most_chars_per_token

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
LETTERS = {char: i for i, char in enumerate(sorted(ALPHABET))}
VOCAB = LETTERS | {"aa": 256, "aaaa": 257}
BYTE_LEVEL = {"type": "ByteLevel"}


def bound(**changes: Any) -> int | None:
    model = {"type": "BPE", "vocab": VOCAB, **changes.pop("model", {})}
    return most_chars_per_token({"model": model, "pre_tokenizer": BYTE_LEVEL, **changes}, ALPHABET)


def sequence(*each: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": each, "pretokenizers": each}


@pytest.mark.parametrize(
    ("spec", "chars"),
    [
        ({}, 4),
        ({"added_tokens": [{"content": "<|end|>"}]}, 7),
        ({"added_tokens": [{"content": "<mask>", "lstrip": True}]}, None),
        ({"added_tokens": [{"content": "<mask>", "rstrip": True}]}, None),
        ({"normalizer": {"type": "NFC"}}, 16),
        ({"normalizer": sequence({"type": "NFC"}, {"type": "NFD"})}, 16),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"normalizer": sequence({"type": "NFC"}, {"type": "Strip"})}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}}, 4),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}}, None),
        ({"pre_tokenizer": sequence({"type": "Split", "behavior": "Isolated"}, BYTE_LEVEL)}, 4),
        ({"pre_tokenizer": sequence({"type": "Split", "behavior": "Removed"}, BYTE_LEVEL)}, None),
        ({"pre_tokenizer": sequence({"type": "Whitespace"}, BYTE_LEVEL)}, None),
        ({"model": {"vocab": {"aaaa": 1, "a": 0}}}, None),
        ({"pre_tokenizer": None}, None),
        ({"pre_tokenizer": None, "model": {"unk_token": "?"}}, 4),
        ({"pre_tokenizer": None, "model": {"unk_token": "?", "fuse_unk": True}}, None),
        ({"pre_tokenizer": None, "model": {"byte_fallback": True}}, None),
        (
            {
                "pre_tokenizer": {"type": "Metaspace"},
                "model": {"byte_fallback": True, "fuse_unk": True, "vocab": dict.fromkeys(BYTES, 0)},
            },
            6,
        ),
        ({"model": {"type": "Unigram", "vocab": [["aaaa", 0.0]]}}, None),
        ({"model": {"type": "WordPiece"}}, None),
    ],
)
def test_each_step_has_to_be_known(spec: dict[str, Any], chars: int | None) -> None:
    assert bound(**spec) == chars


def real(*, nfc: bool) -> Tokenizer:
    tokenizer = Tokenizer(BPE(VOCAB, [("a", "a"), ("aa", "aa")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<|end of all|>")])
    return tokenizer


PIECES = st.sampled_from(
    ["a", "aaaa", " ", "\n", "e\u0301", "\u03b1\u0313\u0300\u0345", "\U0001f600", "<|end of all|>"]
)


@given(st.lists(PIECES, max_size=50).map("".join), st.booleans())
def test_no_text_has_fewer_tokens(text: str, nfc: bool) -> None:
    tokenizer = real(nfc=nfc)
    most = most_chars_per_token(loads(tokenizer.to_str()), ALPHABET)
    assert most is not None
    assert len(tokenizer.encode_batch_fast([text])[0]) * most >= len(text)
