"""Creates the demo model: a real llama in a folder, built in one or two seconds without a download.

    python -m gateway.cli.demo_model.model FOLDER

Same seed, same machine: same bytes. The folder is complete or absent, even if the process is killed: it is built in a
sibling folder, under a lock, and renamed.

numpy, tokenizers and safetensors are imported inside functions: they are slow to import, and callers run this module
in a separate process.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway.cli.demo_model.corpus import TEXT
from gateway.cli.demo_model.shape import BEST_SEED, CONTEXT, END, EPSILON, HEADS, ROPE_BASE, SPECIAL, VOCABULARY, Shape

RECIPE = 1  # to be raised when the same arguments give another model; folders of an older recipe are rebuilt
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role in ['system', 'developer'] -%}<|system|>"
    "{%- elif message.role == 'assistant' -%}<|assistant|>"
    "{%- else -%}<|user|>{%- endif -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- elif message.content -%}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}{%- endif -%}"
    "<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def make_tiny_model(folder: Path, *, seed: int = BEST_SEED, hidden: int = 64, layers: int = 2) -> None:
    """Builds the model in ``folder``, replacing its contents. ValueError for invalid sizes."""
    shape = Shape(seed, hidden, layers)
    with _locked(folder):
        _replace(folder, shape)


def ensure_tiny_model(folder: Path, *, seed: int = BEST_SEED, hidden: int = 64, layers: int = 2) -> None:
    """Builds the model if it is missing, incomplete, or another one. Safe to call from several processes at once."""
    shape = Shape(seed, hidden, layers)
    if is_complete(folder, shape):
        return
    with _locked(folder):
        if not is_complete(folder, shape):
            _replace(folder, shape)


def is_complete(folder: Path, shape: Shape | None = None) -> bool:
    """All files exist, and they are of this recipe and ``shape``. Cheap: reads file names and config.json only."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    try:
        made = json.loads((folder / "config.json").read_bytes()).get("demo")
    except (ValueError, AttributeError):
        return False
    return bool(made == _stamp(shape or Shape()))


def _stamp(shape: Shape) -> dict[str, int]:
    return {"recipe": RECIPE, "seed": shape.seed, "hidden": shape.hidden, "layers": shape.layers}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder at a time. The kernel releases the lock of a killed process; the empty lock file is kept on
    purpose."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _sibling(folder, "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sibling(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _replace(folder: Path, shape: Shape) -> None:
    """Called under the lock. ``folder`` holds the old model, is absent, or holds the new one; never a part of one."""
    building, old = _sibling(folder, "building"), _sibling(folder, "old")
    for leftover in (building, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    _write(building, shape)
    if folder.exists():
        folder.rename(old)
    building.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, shape: Shape) -> None:
    # Two threads multiply matrices of this size slower than one, and several times slower on a busy machine.
    # Must be set before numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from safetensors.numpy import save_file  # noqa: PLC0415

    from gateway.cli.demo_model.weights import fit_output, random_weights  # noqa: PLC0415

    tokenizer = _train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = random_weights(shape)
    weights["lm_head.weight"] = fit_output(weights, shape, tokenizer)
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})
    end = tokenizer.token_to_id(END)
    _write_json(folder / "config.json", _config(shape, end))
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _config(shape: Shape, end: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": shape.head,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPSILON,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": False,
        "eos_token_id": end,
        "torch_dtype": "float32",
        "demo": _stamp(shape),
    }


def _train_tokenizer() -> Any:
    """Byte-level BPE: any text can be encoded, words of the corpus are mostly one token. Reproducible."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the corpus is too short for a vocabulary of {VOCABULARY}")
    return tokenizer


def main() -> None:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m gateway.cli.demo_model.model FOLDER\n")
        raise SystemExit(2)
    ensure_tiny_model(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
