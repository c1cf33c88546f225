"""Preflight of a launch: checks of the model's files and the port; placeholders in the command line."""

from collections.abc import Mapping
from pathlib import Path

from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.spec import Launch
from backends.memory import safetensors
from backends.memory.access import unreadable
from backends.memory.hub_cache import folders
from backends.process import ports


def preflight(launch: Launch) -> Failure | None:
    """The failure that the model's files or the port would cause, found before the launch. Blocks. Raises OSError for
    the host of the port."""
    folder, port = launch.model_folder, launch.port
    if folder is not None and (failure := _of_folder(Path(folder))) is not None:
        return failure
    if port and not ports.is_free(launch.host, port):
        holder = ports.holder(launch.host, port) or "another process"
        message = f"port {port} is taken by {holder}; stop it, or omit the port so that the gateway chooses one"
        return Failure(Cause.PORT_IN_USE, Aftermath.EXITED, message, blame=Blame.MACHINE)
    return None


def downloads(launch: Launch) -> bool:
    """The process will fetch files of its model from the hub before it can load it. Blocks."""
    if not launch.model:
        return False
    try:
        safetensors.size_of(next(folders(launch.model, launch.env)))
    except (StopIteration, safetensors.BadWeights, OSError):
        return True
    return False


def _of_folder(folder: Path) -> Failure | None:
    try:
        if folder.is_dir():
            safetensors.size_of(folder)
            return None
    except safetensors.BadWeights as bad:
        return Failure(Cause.LOAD_FAILURE, Aftermath.EXITED, str(bad), blame=Blame.OPERATOR)
    except OSError as error:
        return Failure(Cause.LOAD_FAILURE, Aftermath.EXITED, unreadable(error, folder), blame=Blame.OPERATOR)
    message = f"the model folder {folder} does not exist; correct the path in the config or put the model there"
    return Failure(Cause.MODEL_NOT_FOUND, Aftermath.EXITED, message, blame=Blame.OPERATOR)


def filled(word: str, values: Mapping[str, str]) -> str:
    """``word`` with ``{host}``, ``{port}`` and ``{model}`` replaced; other braces are left unchanged."""
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word
