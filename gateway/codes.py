"""The error code that a client gets for each cause; None where no error of the backend is to be told.

Pure: no I/O, no clock.
"""

from collections.abc import Mapping

from backends.failure import Cause

CODE_OF: Mapping[Cause, str | None] = {
    Cause.OOM: "backend_oom",
    Cause.RESOURCE_LIMIT: "backend_oom",
    Cause.GPU_TIMEOUT: "backend_gpu_error",
    Cause.GPU_VICTIM: "backend_gpu_error",
    Cause.GPU_FAULT: "backend_gpu_error",
    Cause.NATIVE_CRASH: "backend_crashed",
    Cause.KILLED: "backend_crashed",
    Cause.DISTRIBUTED: "backend_crashed",
    Cause.WEDGE: "backend_wedged",
    Cause.STALLED: "backend_stalled",
    Cause.LOAD_FAILURE: "model_unavailable",
    Cause.MODEL_NOT_FOUND: "model_unavailable",
    Cause.DOWNLOAD: "model_unavailable",
    Cause.DISK_FULL: "model_unavailable",
    Cause.PORT_IN_USE: "model_unavailable",
    Cause.DEPENDENCY: "model_unavailable",
    Cause.START_TIMEOUT: "model_unavailable",
    Cause.UNREACHABLE: "model_unavailable",
    Cause.BAD_REQUEST: "invalid_request",
    Cause.CLIENT_GONE: None,
    Cause.NONE: None,
}
