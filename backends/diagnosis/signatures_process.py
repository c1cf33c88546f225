"""Rows of the signature table for a thread or a process that ended without a more specific cause.

``signatures`` describes the table. ``FATAL`` matches lines that report the end of the process: the same process cannot
print anything after such a line.

Pure: no I/O, no clock.
"""

import re

from backends.diagnosis.signature import Signature, Told, sig
from backends.domain.failure import Cause, Reason

_JOB = r"\[\d+\] {1,4}(?:[+-] {1,4})?\d+ "  # a shell's report on its own job: [1]  + 4242 killed
_NATIVE_STATUS = r"(?:-(?:4|5|6|7|8|10|11)|13[2-689]|139)\b"

PROCESS_ROWS: tuple[Signature, ...] = (
    sig(
        "stream of another thread",
        Cause.WEDGE,
        "mlx ≥0.31.2; mlx-lm#1181",
        r"There is no Stream\(\w+, \d+\) in current thread",
    ),
    sig(
        "empty prompt",
        Cause.WEDGE,
        "mlx_lm/generate.py 0.32, insert_segments",
        r"Sequence \d+ has an empty prompt\.",
        told=Told(
            "a prompt of which nothing was left to read ended its generation thread: it was empty, or all of it was in "
            "the prompt cache",
            "Restart it. A prompt is cached whole where it is an earlier prompt with its answer, or without its last "
            "token, or a chat that was sent before with other template settings: change a character of it",
            Reason.EMPTY_PROMPT,
        ),
    ),
    sig("thread died", Cause.WEDGE, "mlx_lm/server.py ≥0.32.0", r"generation thread died"),
    sig(
        "thread died, by Python",
        Cause.WEDGE,
        "mlx_lm/server.py 0.28.4-0.31.3",
        r"Exception in thread [\w-]{1,80} \(_?(?:run_)?generat\w{0,20}\)",
    ),
    sig(
        "engine loop",
        Cause.WEDGE,
        "omlx, vllm-metal",
        r"[Ee]ngine (?:loop|core)[^\n]{0,40} (?:error|died|crashed|failed)",
    ),
    sig(
        "reported stuck",
        Cause.WEDGE,
        "other supervisors",
        r"[Gg]eneration (?:is )?(?:wedged|stuck|deadlocked)|deadlock detected",
        r"consecutive probe failures",
    ),
    sig(
        "terminate",
        Cause.NATIVE_CRASH,
        "libc++, libstdc++",
        r"libc\+\+abi[\w.]{0,20}: |terminate called after",
        r"[Tt]erminating (?:app )?(?:due to|with) uncaught",
    ),
    sig(
        "assertion",
        Cause.NATIVE_CRASH,
        "Metal validation; mlxstudio#42",
        r"failed assertion [`'\"]|Assertion failed: |Assertion `|in the fork\(\) child process\. Crashing",
    ),
    sig("faulthandler", Cause.NATIVE_CRASH, "CPython with PYTHONFAULTHANDLER", r"Fatal Python error: "),
    sig(
        "signal",
        Cause.NATIVE_CRASH,
        "shells, macOS crash reports, exo#1759",
        r"[Ss]egmentation fault|Abort trap: 6|zsh: (?:abort|segmentation|bus error|trace trap|illegal)",
        r"[Bb]us error: \d|Trace/BPT trap|[Ii]llegal (?:hardware )?instruction|\(core dumped\)",
        r"\b(?:SIGABRT|SIGSEGV|SIGBUS|SIGILL|SIGTRAP|SIGFPE)\b|\d Aborted\b",
        r"\bEXC_(?:BAD_ACCESS|CRASH|BREAKPOINT|BAD_INSTRUCTION|ARITHMETIC)\b",
        r"signal: (?:abort|segm|bus|trace|illegal)|\bsignal[ =:]{1,2}(?:4|5|6|7|8|10|11)\b",
        _JOB + r"(?:abort|segmentation|bus error|trace trap|illegal)\b",
        r"\bThread \d+ Crashed:|Termination Reason: +Namespace SIGNAL",
    ),
    sig(
        "heap",
        Cause.NATIVE_CRASH,
        "libmalloc, glibc",
        r"malloc: \*{3} error|double free or corruption|free\(\): invalid|corrupted size vs",
        r"stack smashing detected|malloc\(\): ",
    ),
    sig(
        "Go panic",
        Cause.NATIVE_CRASH,
        "ollama's MLX runner: mlx-c turns any exception into one; ollama#17902",
        r"\bpanic: mlx: |\bgoroutine \d+ \[running\]",
    ),
    sig(
        "exit status in the text",
        Cause.NATIVE_CRASH,
        "other supervisors",
        r"(?:exit(?:ed)?|return(?:ed)?) ?(?:code|status|with|with code)?[:=]? ?" + _NATIVE_STATUS,
    ),
    sig(
        "killed",
        Cause.KILLED,
        "jetsam, Linux OOM killer, shells; omlx#702",
        r"\bSIGKILL\b|zsh: killed\b|Killed: 9|signal: killed|\bsignal[ =:]{1,2}9\b|" + _JOB + r"killed\b",
        r"\[\d+\][+-]? +Killed\b|: +\d+ Killed\b|\(signal: 9|JetsamEvent|JETSAM\b|Killed process \d+",
        r"oom-kill:|oom_reaper|killing_?\w{0,40} process|^\s*Killed\s*$",
        r"(?:exit(?:ed)?|return(?:ed)?) ?(?:code|status|with|with code)?[:=]? ?(?:-9|137)\b",
    ),
    sig(
        "reported crash",
        Cause.NATIVE_CRASH,
        "lmstudio-bug-tracker#2255",
        r"has crashed without additional information|[Ee]xit code: null",
        r"(?:died|exited|crashed) unexpectedly",
    ),
)

# The process itself has ended: it prints nothing afterwards.
FATAL = re.compile(
    r"libc\+\+abi|terminate called after|[Tt]erminating (?:app )?(?:due to|with) uncaught|Fatal Python error: "
    r"|failed assertion [`'\"]|Abort trap: 6|zsh: (?:abort|killed|segm|bus|trace|illegal)|Killed: 9"
    r"|[Ss]egmentation fault|\(core dumped\)"
)
