"""The weight files of a model, by their headers alone: how many bytes they hold, and whether they are all there.

A safetensors file begins with eight bytes that give the length of a JSON header, which says where each tensor lies; so
a file that was cut short is told by its size. mlx before 0.30 loads such a file without a word and serves garbage.
Links are followed: in the hub's cache every file is one. mlx_lm loads ``model*.safetensors``; the index, where there is
one, says which files that should be.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100 << 20  # bytes; the format's own limit


class BadWeights(Exception):
    """The message names the file, and says what is wrong with it and what to do."""


def size_of(folder: Path) -> int:
    """Bytes of all tensors of the model in ``folder``. Raises BadWeights."""
    return sum(_tensor_bytes(file) for file in files(folder))


def size_of_adapters(folder: Path) -> int:
    """Raises BadWeights."""
    file = folder / "adapters.safetensors"
    return _tensor_bytes(file) if file.exists() else 0


def files(folder: Path) -> list[Path]:
    """Raises BadWeights where one that should be there is missing."""
    found = {file.name for file in folder.glob("model*.safetensors")}
    named = set(_named(folder / INDEX))
    if missing := sorted(name for name in named if not (folder / name).exists()):
        raise BadWeights(
            f"{folder / missing[0]} is missing ({len(missing)} of the {len(named)} files that {INDEX} names); "
            "download the model again"
        )
    if not found | named:
        raise BadWeights(f"no model*.safetensors in {folder}; download the model again, or correct the path")
    return [folder / name for name in sorted(found | named)]


def _named(index: Path) -> Iterator[str]:
    """Raises BadWeights."""
    if not index.exists():
        return
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        yield from set(map(str, weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadWeights(f"{index} cannot be read ({exc!r}); download the model again") from exc


def _tensor_bytes(file: Path) -> int:
    try:
        size = file.stat().st_size
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            if not 2 <= length <= MAX_HEADER or length + 8 > size:
                raise BadWeights(f"{file} has no whole header ({size} bytes in all); download it again")
            header: dict[str, Any] = json.loads(data.read(length))
            spans = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
            end = 8 + length + max((int(last) for _, last in spans), default=0)
            total = sum(int(last) - int(first) for first, last in spans)
    except OSError as exc:
        raise BadWeights(f"{file} cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadWeights(f"{file} is no safetensors file ({exc!r}); download it again") from exc
    if size < end:
        raise BadWeights(f"{file} was cut short: {size} bytes, and its header speaks of {end}; download it again")
    return total
