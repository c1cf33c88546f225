"""The weights of the demo model: random layers, and an output matrix fitted to the features that they give for a text.

Only the output matrix is trained, by Adam on features that are computed once. That costs a fraction of
back-propagation and is enough for readable text without meaning: mostly whole words, sensible pairs, another text for
every prompt. A fully random model would repeat one token in greedy decoding, so that a lost or doubled piece of a
stream could not be noticed.

Caveat: ``_features`` must compute what mlx_lm's llama computes (RMS norm, rotary halves, SwiGLU), or the fitted matrix
is applied to other features than it was trained on. All is float32, so that greedy decoding is the same alone and in a
batch.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.cli.demo_model.corpus import TEXT
from gateway.cli.demo_model.shape import ASSISTANT, END, EPSILON, HEADS, ROPE_BASE, USER, VOCABULARY, Shape

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def random_weights(shape: Shape) -> dict[str, Floats]:
    """All weights but the output matrix. The scales were chosen by reading generated text: attention strong enough that
    the whole prompt has an effect, weak enough that the last word has the most."""
    chance = np.random.default_rng(shape.seed)
    hidden, mlp = shape.hidden, shape.mlp

    def normal(rows: int, columns: int, scale: float) -> Floats:
        return (chance.standard_normal((rows, columns)) * scale).astype(np.float32)

    ones = np.ones(hidden, np.float32)
    weights = {"model.embed_tokens.weight": normal(VOCABULARY, hidden, 1.0), "model.norm.weight": ones}
    for index in range(shape.layers):
        layer = f"model.layers.{index}."
        for name in "qkvo":
            weights[f"{layer}self_attn.{name}_proj.weight"] = normal(hidden, hidden, hidden**-0.5)
        for name in ("gate", "up"):
            weights[f"{layer}mlp.{name}_proj.weight"] = normal(mlp, hidden, hidden**-0.5)
        weights[f"{layer}mlp.down_proj.weight"] = normal(hidden, mlp, 0.7 * mlp**-0.5)
        weights[f"{layer}input_layernorm.weight"] = ones
        weights[f"{layer}post_attention_layernorm.weight"] = ones
    return weights


def _features(ids: Ints, weights: dict[str, Floats], shape: Shape) -> Floats:
    """The input of the output matrix: (batch, time) ids → (batch, time, hidden)."""

    def norm(x: Floats) -> Floats:
        root: Floats = np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPSILON))
        return x / root

    batch, time = ids.shape
    half = shape.head // 2
    angle = np.arange(time)[:, None] * ROPE_BASE ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    future = np.triu(np.full((time, time), -1e9, np.float32), 1)

    def heads(x: Floats) -> Floats:
        return x.reshape(batch, time, HEADS, shape.head).transpose(0, 2, 1, 3)

    def rotate(x: Floats) -> Floats:
        low, high = x[..., :half], x[..., half:]
        return np.concatenate([low * cos - high * sin, low * sin + high * cos], -1)

    x = weights["model.embed_tokens.weight"][ids]
    for index in range(shape.layers):
        attention, mlp = (f"model.layers.{index}.{part}." for part in ("self_attn", "mlp"))
        q, k, v = (heads(norm(x) @ weights[f"{attention}{name}_proj.weight"].T) for name in "qkv")
        scores = rotate(q) @ rotate(k).swapaxes(-1, -2) * np.float32(shape.head**-0.5) + future
        mixed: Floats = (_softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, time, -1)
        x += mixed @ weights[f"{attention}o_proj.weight"].T
        gate, up = (norm(x) @ weights[f"{mlp}{name}_proj.weight"].T for name in ("gate", "up"))
        silu: Floats = gate / (1 + np.exp(-gate))
        x += (silu * up) @ weights[f"{mlp}down_proj.weight"].T
    return norm(x)


def _softmax(x: Floats) -> Floats:
    powers: Floats = np.exp(x - x.max(-1, keepdims=True))
    total: Floats = powers.sum(-1, keepdims=True)
    return powers / total


def _samples(corpus: Ints, tokenizer: Any, seed: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Windows of the corpus, read as a ring, and a mask of the tokens to predict. Every second window is the answer to
    a prompt of shuffled words; prompts are not predicted, or the model would learn to end its text."""
    count, length = 48, 128
    chance = np.random.default_rng(seed)
    windows = corpus[(chance.integers(0, len(corpus), count)[:, None] + np.arange(length + 1)) % len(corpus)]
    predicted = np.ones_like(windows, np.bool_)
    for window, mask in zip(windows[::2], predicted[::2], strict=True):
        prompt = int(chance.integers(4, 40))
        window[0] = tokenizer.token_to_id(USER)
        window[1:prompt] = chance.choice(corpus, prompt - 1)
        window[prompt : prompt + 2] = [tokenizer.token_to_id(name) for name in (END, ASSISTANT)]
        mask[: prompt + 2] = False
    return windows, predicted


def fit_output(weights: dict[str, Floats], shape: Shape, tokenizer: Any) -> Floats:
    """The output matrix, (vocabulary, hidden): Adam on the cross entropy of the next token, on features that are
    computed once."""
    windows, predicted = _samples(np.array(tokenizer.encode(TEXT).ids), tokenizer, shape.seed)
    inputs = _features(windows[:, :-1], weights, shape)[predicted[:, 1:]]
    targets = windows[:, 1:][predicted[:, 1:]]
    chance = np.random.default_rng(shape.seed)
    output = np.zeros((VOCABULARY, shape.hidden), np.float32)
    mean, square = np.zeros_like(output), np.zeros_like(output)
    steps, batch = 300, 512
    for step in range(steps):
        chosen = chance.integers(0, len(inputs), batch)
        x = inputs[chosen]
        error = _softmax(x @ output.T)
        error[np.arange(batch), targets[chosen]] -= 1
        gradient = error.T @ x / np.float32(batch)
        mean = np.float32(0.9) * mean + np.float32(0.1) * gradient
        square = np.float32(0.98) * square + np.float32(0.02) * gradient * gradient
        rate = np.float32(0.3 * (1 - step / steps) / (1 - 0.9 ** (step + 1)))
        output -= rate * mean / (np.sqrt(square / np.float32(1 - 0.98 ** (step + 1))) + np.float32(1e-6))
    return output
