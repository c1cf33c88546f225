"""How many characters one token of a tokenizer can stand for, so that a text is known to be too long without being
tokenized. Pure.

The answer must never be too small: a prompt that fits would be refused. So it is given only for tokenizers of which
every step is known, and None for all others, whose tokens may stand for any amount of text:

    normalizer      may shorten the text: NFC makes one character of up to four; others may remove any number
    pre-tokenizer   may drop what lies between words
    model           only BPE: WordPiece and WordLevel have one token for a whole unknown word, Unigram one for a row of
                    unknown characters. A BPE that lacks bytes drops what it does not know
    added tokens    with ``lstrip`` or ``rstrip`` they take all blanks beside them

Caveat: the entries of a byte-level vocabulary have a character for each byte, so their lengths are in bytes; a
character has at least one.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

Spec = Mapping[str, Any]

NFC_FACTOR = 4  # the longest canonical decomposition, such as that of U+1F82
NORMALIZERS = {"NFC": NFC_FACTOR, "NFKC": NFC_FACTOR, "NFD": 1, "NFKD": 1, "Prepend": 1, "ByteLevel": 1}
KEEPING = frozenset({"ByteLevel", "Metaspace", "Digits"})  # pre-tokenizers that drop nothing
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def most_chars_per_token(spec: Spec, alphabet: Iterable[str]) -> int | None:
    """``spec``: the contents of tokenizer.json; ``alphabet``: the 256 characters that stand for bytes in byte-level
    vocabularies. Raises KeyError, TypeError for what is no such file."""
    model, added = spec["model"], spec.get("added_tokens") or []
    factor = _shrinks(spec.get("normalizer"))
    if factor is None or model.get("type") != "BPE" or not _keeps(spec.get("pre_tokenizer")):
        return None
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None
    vocab = model["vocab"]
    if not _has_all(model, vocab, spec.get("pre_tokenizer"), alphabet):
        return None
    return factor * max(*map(len, vocab), *(len(token["content"]) for token in added), 1)


def _shrinks(normalizer: Spec | None) -> int | None:
    """By what factor at most; None = not known."""
    if normalizer is None:
        return 1
    kind = normalizer.get("type")
    if kind == "Sequence":
        factors = [_shrinks(each) for each in normalizer["normalizers"]]
        return None if None in factors else prod(factor for factor in factors if factor is not None)
    if kind == "Replace":
        replaced = normalizer["pattern"].get("String")
        return 1 if replaced is not None and len(normalizer["content"]) >= len(replaced) else None
    return NORMALIZERS.get(str(kind))


def _keeps(pre_tokenizer: Spec | None) -> bool:
    """Whether all of the text gets to the model."""
    if pre_tokenizer is None:
        return True
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return all(_keeps(each) for each in pre_tokenizer["pretokenizers"])
    if kind in ("Split", "Punctuation"):
        return bool(pre_tokenizer.get("behavior") != "Removed")
    return kind in KEEPING


def _has_all(model: Spec, vocab: Spec, pre_tokenizer: Spec | None, alphabet: Iterable[str]) -> bool:
    """Whether each character is in at least one token, and none holds a row of unknown ones."""
    if _is_byte_level(pre_tokenizer):
        return all(char in vocab for char in alphabet)
    if model.get("byte_fallback") and all(byte in vocab for byte in BYTES):
        return True
    return model.get("unk_token") is not None and not model.get("fuse_unk")


def _is_byte_level(pre_tokenizer: Spec | None) -> bool:
    if pre_tokenizer is None:
        return False
    each = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    return any(one.get("type") == "ByteLevel" for one in each)
