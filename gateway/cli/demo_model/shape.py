"""Dimensions and special tokens of the demo model, shared by its files, weights and tokenizer."""

from dataclasses import dataclass

END, SYSTEM, USER, ASSISTANT = SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 1024
CONTEXT = 32768
HEADS = 4
ROPE_BASE = 10000.0
EPSILON = 1e-5
BEST_SEED = 28  # of 0 to 69: twelve prompts gave texts of at least 55 different tokens in 100, none twice in a row


@dataclass(frozen=True, slots=True)
class Shape:
    """``hidden`` must divide into HEADS heads of an even width."""

    seed: int = BEST_SEED
    hidden: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        if self.hidden <= 0 or self.hidden % (2 * HEADS) or self.layers < 1:
            raise ValueError(f"hidden must be a multiple of {2 * HEADS} and layers at least 1, got {self}")

    @property
    def mlp(self) -> int:
        return 2 * self.hidden

    @property
    def head(self) -> int:
        return self.hidden // HEADS
