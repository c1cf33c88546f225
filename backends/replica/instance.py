"""One process, from its spawn to its reaping: its identity, its parts, and the verdicts on its end."""

from dataclasses import dataclass, replace
from signal import SIGHUP, SIGINT, SIGTERM, Signals

from backends.diagnosis.log_parser import LogParser
from backends.diagnosis.verdict import Evidence, Verdict, judge
from backends.domain.failure import HARMLESS, Aftermath, Blame, Cause, Failure
from backends.process.child import ChildProcess
from backends.replica.call_judge import CallJudge
from backends.replica.liveness import Condemn
from backends.replica.monitor import LivenessMonitor
from backends.replica.process_memory import ProcessMemory
from backends.upstream.exchange import Dialer

WINDOW = 400  # lines of output that a verdict looks at: a cause that was named longer ago has nothing to do with it


@dataclass(eq=False, slots=True)
class Instance:
    """``log`` is fed each line of output. ``calls`` holds the verdict, ``monitor`` what is known of its health."""

    backend: str
    generation: int
    port: int
    child: ChildProcess
    dialer: Dialer
    log: LogParser
    memory: ProcessMemory
    monitor: LivenessMonitor
    calls: CallJudge
    asked_to_stop: bool = False

    def named(self, failure: Failure) -> Failure:
        return replace(failure, backend=self.backend, generation=self.generation)

    def of_exit(self, returncode: int) -> Failure:
        """What the end of the process means."""
        if self.asked_to_stop:
            message = f"{self.backend} was stopped by the gateway"
            return self.named(Failure(Cause.NONE, Aftermath.EXITED, message, blame=Blame.GATEWAY, exit=returncode))
        seen = judge(
            Evidence(
                self.log.reading(),
                returncode,
                starting=not self.monitor.was_ready,
                memory_short=self.memory.short,
                memory_limited=self.memory.limited,
            )
        )
        cause, blame, message = _unwanted_exit(seen, returncode)
        message = f"{self.backend} died: {message}"
        return self.named(
            Failure(cause, Aftermath.EXITED, message, blame=blame, evidence=seen.evidence, exit=returncode)
        )

    def of_condemned(self, finding: Condemn) -> Failure:
        """What it means that a living process has to be replaced."""
        seen = judge(Evidence(self.log.reading(self.monitor.since), health=self.monitor.health))
        same = seen.cause is finding.cause
        failure = Failure(
            finding.cause,
            Aftermath.WEDGED,
            f"{self.backend} is being replaced: {finding.reason}" + (f" ({seen.message})" if same else ""),
            blame=seen.blame if same else Blame.BACKEND,
            evidence=seen.evidence if same else (),
        )
        return self.named(failure)


def _unwanted_exit(seen: Verdict, returncode: int) -> tuple[Cause, Blame, str]:
    """Nothing had asked it to end: that is a failure whatever it printed."""
    if returncode in (-SIGHUP, -SIGINT, -SIGTERM) and seen.cause in HARMLESS:
        return Cause.KILLED, Blame.MACHINE, f"it was ended from outside ({Signals(-returncode).name})"
    if not seen.backend_failed:
        return Cause.NATIVE_CRASH, seen.blame, f"it exited with status {returncode} though nobody had stopped it"
    if seen.cause is Cause.NATIVE_CRASH and returncode > 0:
        return seen.cause, seen.blame, f"it exited by itself with status {returncode}"
    return seen.cause, seen.blame, seen.message
