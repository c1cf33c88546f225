"""One instance of a replica: one process from spawn to reaping, its parts, and the verdict on its end."""

from dataclasses import dataclass, replace
from signal import SIGHUP, SIGINT, SIGTERM, Signals

from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.log_parser import LogParser
from backends.diagnosis.verdict import Evidence, Verdict, judge
from backends.domain.failure import HARMLESS, Aftermath, Blame, Cause, Failure
from backends.domain.report import EngineReport
from backends.process.channel import Channel
from backends.process.child import ChildProcess
from backends.replica.call_judge import CallJudge
from backends.replica.liveness import Condemn
from backends.replica.monitor import LivenessMonitor
from backends.replica.process_memory import ProcessMemory
from backends.upstream.exchange import Dialer

LOG_WINDOW = 400  # lines of output that count for a verdict: a cause in earlier lines is unrelated to the failure


@dataclass(eq=False, slots=True)
class Instance:
    """``log`` is fed each line of output. ``calls`` holds the verdict, ``monitor`` the state of health."""

    backend: str
    generation: int
    port: int
    child: ChildProcess
    dialer: Dialer
    log: LogParser
    memory: ProcessMemory
    monitor: LivenessMonitor
    calls: CallJudge
    downloads: bool = False  # the files of its model were not all there at the launch
    asked_to_stop: bool = False
    ended: bool = False  # its process was reaped
    channel: Channel | None = None  # None: not started with the instrument

    @property
    def identity(self) -> EngineIdentity:
        return self.calls.identity

    @property
    def report(self) -> EngineReport | None:
        """What the process tells of itself; None = nothing, or nothing new."""
        return None if self.channel is None else self.channel.report

    def identified(self, failure: Failure) -> Failure:
        return replace(failure, backend=self.backend, generation=self.generation)

    def of_exit(self, returncode: int) -> Failure:
        """The failure for the exit of the process."""
        if self.asked_to_stop:
            message = f"{self.backend} was stopped by the gateway"
            return self.identified(Failure(Cause.NONE, Aftermath.EXITED, message, blame=Blame.GATEWAY, exit=returncode))
        verdict = judge(
            Evidence(
                self.log.reading(),
                returncode,
                starting=not self.monitor.was_ready,
                memory_short=self.memory.short,
                memory_limited=self.memory.limited,
            )
        )
        cause, blame, message = _unwanted_exit(verdict, returncode)
        message = f"{self.backend} died: {message}"
        return self.identified(
            Failure(
                cause,
                Aftermath.EXITED,
                message,
                blame=blame,
                evidence=verdict.evidence,
                exit=returncode,
                reason=verdict.reason if cause is verdict.cause else None,
            )
        )

    def of_condemned(self, finding: Condemn) -> Failure:
        """The failure for a running process that has to be replaced."""
        verdict = judge(
            Evidence(
                self.log.reading(self.monitor.since),
                health=self.monitor.health,
                thread_ended=self.monitor.thread_ended,
            )
        )
        same = verdict.cause is finding.cause
        failure = Failure(
            finding.cause,
            Aftermath.WEDGED,
            f"{self.backend} is being replaced: {finding.reason}" + (f" ({verdict.message})" if same else ""),
            blame=verdict.blame if same else Blame.BACKEND,
            evidence=verdict.evidence if same else (),
            reason=verdict.reason if same else None,
        )
        return self.identified(failure)


def _unwanted_exit(verdict: Verdict, returncode: int) -> tuple[Cause, Blame, str]:
    """The gateway had not stopped the process, so its exit is a failure whatever its output says."""
    if returncode in (-SIGHUP, -SIGINT, -SIGTERM) and verdict.cause in HARMLESS:
        return Cause.KILLED, Blame.MACHINE, f"it was terminated from outside ({Signals(-returncode).name})"
    if not verdict.backend_failed:
        return (
            Cause.NATIVE_CRASH,
            verdict.blame,
            f"it exited with status {returncode} although it was not asked to stop",
        )
    if verdict.cause is Cause.NATIVE_CRASH and returncode > 0:
        return verdict.cause, verdict.blame, f"it exited by itself with status {returncode}"
    return verdict.cause, verdict.blame, verdict.message
