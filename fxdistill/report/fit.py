"""Whether a step fits into a given memory, and what to do if it does not."""

from dataclasses import dataclass

from fxdistill.base.figures import bytes_of, share, size
from fxdistill.errors import OptionError, did_you_mean
from fxdistill.report.data import Facts, Memory, Moment

# The part of the peak above weights from which a share of it is worth an advice.
LARGE = 0.3
SMALL = 64 * 2**20  # bytes that no advice is worth
FEWER = "match fewer layers (0, 2, 4, ... say), or reduce the values that are compared"
# What can be done about each owner of memory.
ADVICE = {
    "losses": FEWER,
    "taps": FEWER,
    "head": "let the head be fused (the passes say what keeps it from it)",
    "student": "checkpoint the student's layers, or take smaller batches and accumulate",
    "gradients": "train fewer parameters (adapters), or shard the student",
}


@dataclass(frozen=True)
class Fit:
    """The bytes that a step needs beside those that there are; true where it fits."""

    needed: int
    memory: int
    optimizer: str
    advice: str = ""

    def __bool__(self) -> bool:
        return self.needed <= self.memory

    def __str__(self) -> str:
        """One sentence, and what to do."""
        both = f"{size(self.needed)} with {self.optimizer}, {size(self.memory)} are there"
        if self:
            return f"fits: the step needs {both} ({share(self.needed, self.memory)})"
        advice = f". At the peak: {self.advice}" if self.advice else ""
        return f"does not fit: the step needs {both}{advice}"


def fit_of(report: Facts, memory: int | str, optimizer: str) -> Fit:
    """``Report.fit``."""
    given = bytes_of(memory) if isinstance(memory, str) else memory
    if given is None:
        raise OptionError(f"memory={memory!r}: a number of bytes, or a text such as '80GB'")
    if report.memory is None:
        why = (report.stopped or "nothing learns").splitlines()[0]
        raise OptionError(f"this report does not know what the step needs: {why}")
    # One line of the report may name several optimizers: "Adam, AdamW".
    states = {
        name: count
        for names, count in report.memory.optimizers.items()
        for name in names.split(", ")
    }
    if optimizer not in states:
        near = did_you_mean(optimizer, states)
        raise OptionError(f"no optimizer {optimizer!r} in the report. Nearest: {near}.")
    return Fit(report.memory.peak + states[optimizer], given, optimizer, advice_of(report.memory))


def advice_of(memory: Memory) -> str:
    """What holds most of the peak above the weights, and what can be done about it."""
    peak = peak_of(memory)
    if peak is None:
        return ""
    parts = {name: count for name, count in peak.held.items() if name != "weights"}
    whole = sum(parts.values())
    largest = sorted((name for name in parts if name in ADVICE), key=lambda n: -parts[n])
    told = [
        f"{name}, {size(parts[name])}: {ADVICE[name]}"
        for name in largest
        if whole and parts[name] >= LARGE * whole
    ]
    return "; ".join(told)


def peak_of(memory: Memory) -> Moment | None:
    """The moment at which most is held; ``None`` without a timeline."""
    return max(memory.timeline, key=lambda moment: moment.total, default=None)


def of_losses(memory: Memory) -> str:
    """The note on losses and taps that hold much of the peak; ``""`` where they do not."""
    peak = peak_of(memory)
    if peak is None:
        return ""
    own = peak.held.get("losses", 0) + peak.held.get("taps", 0)
    if own < SMALL or own < LARGE * (peak.total - peak.held.get("weights", 0)):
        return ""
    return f"losses and matched values hold {size(own)} of the peak's {size(peak.total)}: {FEWER}"
