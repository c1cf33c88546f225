"""Rows of the signature table for peers, the GPU and memory.

``signatures`` describes the table. Metal errors are matched by code name or number (before the prefix kIOGPU the names
had kIOAccel, and the text "IOAF code N"), and last by the English sentence, which macOS translates.

Pure: no I/O, no clock.
"""

from backends.diagnosis.signature import Signature, sig
from backends.domain.failure import Cause

_CODE = r"(?:kIOGPU|kIOAccel)CommandBufferCallbackError"

GPU_ROWS: tuple[Signature, ...] = (
    sig(
        "ring",
        Cause.DISTRIBUTED,
        "distributed/ring/ring.cpp",
        r"\[ring\] (?!Rank \d+ (?:accepting|connecting)|Attempt \d)",
    ),
    sig(
        "jaccl",
        Cause.DISTRIBUTED,
        "distributed/jaccl/*.cpp ≥0.30; exo#1390",
        r"\[jaccl\] (?!Connection attempt)|\[ibv\] (?!Connection attempt)",
    ),
    sig(
        "nccl", Cause.DISTRIBUTED, "distributed/nccl/nccl.cpp", r"\[nccl\] |NCCL error |ncclSystemError|ncclRemoteError"
    ),
    sig(
        "mpi",
        Cause.DISTRIBUTED,
        "distributed/mpi",
        r"\[mpi\] |MPI_ABORT was invoked|mpirun noticed that process|MPI_ERR",
    ),
    sig("no peer", Cause.DISTRIBUTED, "ring.cpp ≥0.32.1", r"connection to a peer was lost|Too many send/recv errors"),
    sig(
        "distributed start",
        Cause.DISTRIBUTED,
        "distributed/distributed.cpp",
        r"\[distributed\] Couldn't init|Cannot initialize \w+ distributed backend",
        r"\[Rank \d+\] connect\(\) failed",
    ),
    sig("rank gone", Cause.DISTRIBUTED, "mlx/_distributed_utils/launch.py", r"Node with rank \d+ was killed"),
    sig(
        "buffer count",
        Cause.RESOURCE_LIMIT,
        "metal/allocator.cpp ≥0.22.0; mlx-lm#1505",
        r"Resource limit \(\d+\) exceeded",
    ),
    sig("Metal 8", Cause.OOM, "mlx-lm#1015", _CODE + r"OutOfMemory", r"IOAF code 8\b|\(0{7}8:|Domain Code=8\b"),
    sig(
        "allocation",
        Cause.OOM,
        "*/allocator.cpp, all",
        r"\[(?:metal::)?malloc(?:_or_wait|_async)?\] Unable to allocate",
    ),
    sig("one buffer too big", Cause.OOM, "metal/allocator.cpp, all", r"greater than the maximum allowed buffer size"),
    sig(
        "CUDA memory",
        Cause.OOM,
        "cuda/allocator.cpp",
        r"\bcuda[^\n]{0,260}failed: out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation",
        r"CUDA(?: error)?:? out of memory|CUBLAS_STATUS_ALLOC_FAILED",
    ),
    sig(
        "Metal 2",
        Cause.GPU_TIMEOUT,
        "mlx#3267, wgpu#336",
        _CODE + r"Timeout",
        r"IOAF code 2\b|\(0{7}2:|Domain Code=2\b",
    ),
    sig("Metal 3", Cause.GPU_TIMEOUT, "mlx-vlm#1064", _CODE + r"Hang", r"IOAF code 3\b|\(0{7}3:"),
    sig(
        "Metal e",
        Cause.GPU_TIMEOUT,
        "mlx#1231, ollama#15194",
        _CODE + r"ImpactingInteractivity",
        r"IOAF code 14\b|\(0{7}[eE]:",
    ),
    sig("event wait", Cause.GPU_TIMEOUT, "metal/event.cpp, fence.cpp <0.32", r"\[(?:Event|Fence)::\w+\] Timed out"),
    sig(
        "CUDA watchdog",
        Cause.GPU_TIMEOUT,
        "CUDA runtime",
        r"the launch timed out and was terminated|cudaErrorLaunchTimeout",
    ),
    sig("Metal 5", Cause.GPU_VICTIM, "mlx-openai-server#169", _CODE + r"InnocentVictim", r"IOAF code 5\b|\(0{7}5:"),
    sig("Metal 4", Cause.GPU_FAULT, "IOGPUFamily", _CODE + r"SubmissionsIgnored", r"IOAF code 4\b|\(0{7}4:"),
    sig(
        "Metal 9", Cause.GPU_FAULT, "mlx-vlm#270", _CODE + r"InvalidResource", r"IOAF code 9\b|\(0{7}9:|Domain Code=9\b"
    ),
    sig(
        "Metal b", Cause.GPU_FAULT, "mlx-vlm#1064", _CODE + r"PageFault", r"IOAF code 11\b|\(0{7}[bB]:|Domain Code=3\b"
    ),
    # The English text, for logs that lack the code.
    sig("English 2, 3", Cause.GPU_TIMEOUT, "IOGPUFamily", r"Caused GPU (?:Timeout|Hang) Error|Impacting Interactivity"),
    sig("English 5", Cause.GPU_VICTIM, "IOGPUFamily", r"victim of GPU error/recovery"),
    sig("English 4, b", Cause.GPU_FAULT, "IOGPUFamily", r"prior/excessive GPU errors|GPU Address Fault"),
    sig("English 8", Cause.OOM, "IOGPUFamily", r"(?:\[METAL\]|[Cc]ommand buffer)[^\n]{0,120}Insufficient Memory"),
    sig(
        "any Metal code",
        Cause.GPU_FAULT,
        "metal/eval.cpp ≥0.0.10",
        _CODE,
        r"\[METAL\] Command buffer execution failed: ?\S",
    ),
    sig(
        "GPU kernel panic",
        Cause.GPU_FAULT,
        "mlx#3186, mlx#3346",
        r"prepare count underflow|@IOGPU\w*\.cpp:\d+|panic\(cpu[^\n]{0,200}(?:IOGPU|AGX)",
    ),
    sig(
        "CUDA device",
        Cause.DEPENDENCY,
        "CUDA runtime; cuda/jit_module.cpp",
        r"CUDA driver version is insufficient|no CUDA-capable device|no kernel image is available",
        r"unsupported display driver|PTX was compiled with an unsupported|nvrtc\w* [^\n]{0,80}failed",
        r"CUDA headers",
    ),
    sig(
        "CUDA",
        Cause.GPU_FAULT,
        "cuda/utils.cpp; mlx#2821, mlx-lm#672",
        r"\b(?:cuda|cublas|cudnn|cusolver|cufft|cu)[A-Z][^\n]{0,300}failed(?::| with code)",
        r"illegal memory access|unspecified launch failure|device-side assert|misaligned address",
        r"CUDA error|failed with code: [\w -]{1,60}\.$",
    ),
    # After the GPU's own texts: memory errors of Python, C++ and other servers. The OOM killer's line is `killed`.
    sig(
        "memory",
        Cause.OOM,
        "CPython, libc++",
        r"\bMemoryError\b|std::bad_alloc|Cannot allocate memory|\[Errno 12\]",
        r"MTLCommandBufferErrorOutOfMemory|(?<!No )\b[Oo]ut[ -][Oo]f[ -][Mm]emory\b(?!: Kill| killer)",
        r"\bOutOfMemoryError\b",
    ),
    sig(
        "admission guard",
        Cause.OOM,
        "omlx#3431, omlx#1998, mlx-serve#44, ollama, LM Studio",
        r"does not fit (?:under|in|into) [^\n]{0,60}memory",
        r"[Ii]nsufficient (?:GPU |system |unified )?[Mm]emory",
        r"[Nn]ot enough (?:GPU |system |free |unified )?memory|InsufficientMemory",
        r"exceeds? [^\n]{0,60}memory (?:limit|budget|ceiling)|requires more [^\n]{0,30}memory",
        r"insufficient system resources|would require ~?[\d.]{1,20} ?\w{1,5} [^\n]{0,120}(?:ceiling|limit|available)",
        r"[Mm]emory (?:guard|limit|ceiling)[^\n]{0,60}(?:exceeded|abort|reject)",
    ),
)
