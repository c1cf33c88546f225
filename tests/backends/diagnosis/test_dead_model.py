"""Texts that say that a model is gone, and texts that only sound like it."""

import time

import pytest

from backends.diagnosis.dead_model import cause_in
from backends.domain.failure import Cause

CRASHED = [
    "The model has crashed without additional information. (Exit code: 18446744072635812000)",
    "The model has crashed",
    "Error: The model has crashed without additional information. (Exit code: 6)",
    "Channel Error: The model has crashed",
    "llama runner process has terminated: exit status 2",
    "llama runner process has terminated: GGML_ASSERT(tensor->op == GGML_OP_UNARY) failed",
    "llama runner process no longer running: -1",
    "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error",
    "an error was encountered while running the model: unexpected EOF",
    'POST predict: Post "http://127.0.0.1:52208/completion": EOF',
    "unspecific error: upstream command exited prematurely",
    "upstream command exited prematurely with no error",
    "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
    "Background loop has errored already.",
    "Background loop is stopped.",
    "Engine loop is not running. Inspect the stacktrace to find the original error",
    "Task finished unexpectedly. This should never happen!",
    "litellm.InternalServerError: OpenAIException - generation thread died",
    "The inference engine process died",
    "Model 'qwen3:4b' was terminated",
    "The backend has crashed",
]
GONE = [
    "Model unloaded.",
    "Model is unloaded.",
    "Model reloaded.",
    "Model not loaded",
    "Error: Model is unloaded.",
    "Model mlx-community/Qwen3-4B-4bit is not loaded",
    'Model "qwen3" is loading',
    "No models loaded. Please load a model in the developer page or use the 'lms load' command.",
    "No models are currently loaded.",
    "Loading model",
    'Failed to load model "qwen/qwen3-coder-30b". Error: Operation canceled.',
    "unable to load model: /models/blobs/sha256-7dd5",
    "error loading model",
    "model failed to load, this may be due to resource limitations or an internal error",
    "timed out waiting for llama runner to start",
    "Cannot load Qwen3.5-122B: projected memory 127.68GB would exceed process limit 88.00GB",
    "unable to start process: fork/exec: no such file",
    "health check timed out after 120s",
]
NEITHER = [
    "",
    "Bad request",
    "model 'x' not found",
    "The model `gpt-4` does not exist",
    "The model does not support images",
    "This model's maximum context length is 4096 tokens",
    "The prompt says: the model has crashed",
    "Unknown role: The model has crashed",
    "'the model has crashed' is not one of ['user', 'assistant']",
    "Conversation roles must alternate user/assistant",
    "Model failed to load the image at http://x/y.png",
    "Invalid value: 'Model unloaded.'",
    "tools[0]: the process has exited",
    "You asked why the server died",
    "max_tokens must be at least 1",
]


@pytest.mark.parametrize("text", CRASHED)
def test_crashed(text: str) -> None:
    assert cause_in(text) is Cause.NATIVE_CRASH


@pytest.mark.parametrize("text", GONE)
def test_unloaded(text: str) -> None:
    assert cause_in(text) is Cause.UNREACHABLE


@pytest.mark.parametrize("text", NEITHER)
def test_neither(text: str) -> None:
    assert cause_in(text) is None


def test_a_model_that_does_not_fit() -> None:
    assert cause_in("model requires more system memory (5.5 GiB) than is available (3.9 GiB)") is Cause.OOM


@pytest.mark.parametrize(
    "text", ["error " * 10**5, "a.error:" * 10**5, "the " * 10**5, "model '" * 10**5, "Error: model " + "a/" * 10**5]
)
def test_its_time_does_not_grow_with_the_text(text: str) -> None:
    began = time.perf_counter()
    cause_in(text)
    assert time.perf_counter() - began < 0.05
