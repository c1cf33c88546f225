"""The weight files of a model: total size and completeness, from their headers only.

A safetensors file begins with eight bytes that give the length of a JSON header, which gives the offsets of each
tensor; so a truncated file is detected by its size. mlx before 0.30 loads such a file without an error and serves
garbage. Links are followed: in the hub cache every file is a link. mlx_lm loads ``model*.safetensors``; the index, if
there is one, names the files that there should be.

Headers are cached by path, size and modification time of the file: a launch reads them twice, once for completeness
and once for the size. All functions block.
"""

import fnmatch
from functools import lru_cache
from pathlib import Path

from backends.memory.access import denied
from backends.memory.json_reader import JsonReader

INDEX = "model.safetensors.index.json"
MAX_CACHED_HEADERS = 4096  # files; the largest models have some hundred each
MAX_HEADER = 100 << 20  # bytes; the format's own limit


class BadWeights(Exception):
    """The message names the file, the fault and the remedy."""


def size_of(folder: Path) -> int:
    """Bytes of all tensors of the model in ``folder``. Raises BadWeights."""
    try:
        return sum(_tensor_bytes(file) for file in files(folder))
    except PermissionError as error:
        raise BadWeights(denied(error)) from error


def size_of_adapters(folder: Path) -> int:
    """Raises BadWeights."""
    file = folder / "adapters.safetensors"
    try:
        return _tensor_bytes(file) if file.exists() else 0
    except PermissionError as error:
        raise BadWeights(denied(error)) from error


def files(folder: Path) -> list[Path]:
    """Raises BadWeights if a file is missing, PermissionError."""
    found = set(fnmatch.filter(_names(folder), "model*.safetensors"))
    named = _named(folder / INDEX)
    if missing := sorted(name for name in named if not (folder / name).exists()):
        raise BadWeights(
            f"{folder / missing[0]} is missing ({len(missing)} of the {len(named)} files that {INDEX} names); "
            "download the model again"
        )
    if not found | named:
        raise BadWeights(f"no model*.safetensors in {folder}; download the model again, or correct the path")
    return [folder / name for name in sorted(found | named)]


def _names(folder: Path) -> list[str]:
    """Empty where there is no such folder. Raises PermissionError, which ``Path.glob`` does not."""
    try:
        return [file.name for file in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _named(index: Path) -> frozenset[str]:
    """The files that the index names; empty without an index. Raises BadWeights, PermissionError."""
    try:
        stat = index.stat()
        return _weight_map(index, stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        return frozenset()
    except PermissionError:
        raise
    except (OSError, ValueError) as exc:
        raise BadWeights(f"{index} cannot be read ({exc!r}); download the model again") from exc


@lru_cache(maxsize=MAX_CACHED_HEADERS)
def _weight_map(index: Path, _size: int, _mtime_ns: int) -> frozenset[str]:
    """Raises OSError, ValueError."""
    found: set[str] | None = None
    reader = JsonReader(index.read_text("utf-8"))
    for key in reader.members():
        if key == "weight_map":
            found = {str(reader.value()) for _ in reader.members()}
        else:
            reader.value()
    reader.end()
    if found is None:
        raise ValueError("weight_map is missing")
    return frozenset(found)


def _tensor_bytes(file: Path) -> int:
    """Raises BadWeights, PermissionError."""
    try:
        stat = file.stat()
        total, end = _header(file, stat.st_size, stat.st_mtime_ns)
    except PermissionError:
        raise
    except OSError as exc:
        raise BadWeights(f"{file} cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise BadWeights(f"{file} is not a safetensors file ({exc!r}); download it again") from exc
    if stat.st_size < end:
        message = f"{file} was cut short: {stat.st_size} bytes, and its header says {end}; download it again"
        raise BadWeights(message)
    return total


@lru_cache(maxsize=MAX_CACHED_HEADERS)
def _header(file: Path, size: int, _mtime_ns: int) -> tuple[int, int]:
    """(bytes of all tensors, size that the file should have). Raises BadWeights, OSError; ValueError, KeyError or
    TypeError for another kind of file."""
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if not 2 <= length <= MAX_HEADER or length + 8 > size:
            raise BadWeights(f"{file} has no complete header ({size} bytes in all); download it again")
        reader = JsonReader(data.read(length).decode())
    total = last = 0
    for name in reader.members():
        tensor = reader.value()
        if name != "__metadata__":
            first, end = tensor["data_offsets"]
            total += int(end) - int(first)
            last = max(last, int(end))
    reader.end()
    return total, 8 + length + last
