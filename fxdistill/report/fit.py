"""Whether a step fits into a given memory, and what to do if it does not."""

from dataclasses import dataclass

from fxdistill.base.figures import bytes_of, share, size
from fxdistill.errors import OptionError, did_you_mean
from fxdistill.report.data import Facts, Memory, Moment

# The part of the peak above weights from which a share of it is worth an advice.
LARGE = 0.3
SMALL = 64 * 2**20  # bytes that no advice is worth
NARROWER = "hold the {} in bfloat16, or quantize it"
SMALLER = "quantize the {}, or take a smaller one"
MOST = 0.6  # the share of all that a step needs from which weights and their states dominate
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
    needed = report.memory.peak + states[optimizer]
    heavy = of_weights(report, report.memory, states[optimizer], optimizer, given)
    advice = advice_of(report.memory, beside=needed if heavy else 0)
    return Fit(needed, given, optimizer, "; ".join(filter(None, (heavy, advice))))


def advice_of(memory: Memory, beside: int = 0) -> str:
    """What holds most of the peak above the weights, and what can be done about it.

    Where weights are advised on, ``beside`` is all that the step needs: gradients go with the
    weights, and what holds no large part of it all is left out.
    """
    peak = peak_of(memory)
    if peak is None:
        return ""
    heavy = ("weights", "gradients") if beside else ("weights",)
    parts = {name: count for name, count in peak.held.items() if name not in heavy}
    whole = sum(parts.values())
    largest = sorted((name for name in parts if name in ADVICE), key=lambda n: -parts[n])
    told = [
        f"{name}, {size(parts[name])}: {ADVICE[name]}"
        for name in largest
        if whole and parts[name] >= max(LARGE * whole, _least(name) * beside)
    ]
    return "; ".join(told)


def _least(owner: str) -> float:
    """The share of all from which an owner is advised on beside the weights.

    Losses and taps never reach theirs where the weights are most of all.
    """
    return 1 - MOST if owner in ("losses", "taps") else (1 - MOST) / 2


def of_weights(report: Facts, memory: Memory, states: int, optimizer: str, given: int) -> str:
    """What to do about weights, gradients and an optimizer's states; empty where others dominate.

    They dominate where they are most of what the step needs, or more than there is by themselves.
    """
    peak = peak_of(memory)
    gradients = 0 if peak is None else peak.held.get("gradients", 0)
    weights = sum(memory.weights.values())
    whole = weights + gradients + states
    if whole < MOST * (memory.peak + states) and whole <= given:
        return ""
    held = {**memory.weights, "gradients": gradients, f"states of {optimizer}": states}
    parts = ", ".join(f"{name} {size(count)}" for name, count in held.items() if count)
    advice = ["train fewer parameters (freeze some, or LoRA)"] if gradients + states else []
    advice += ["shard the models over a mesh (mesh=)"]
    for tower in report.towers:
        if not tower.trainable and memory.weights.get(tower.name, 0) >= LARGE * whole:
            wide = "torch.float32" in tower.dtypes
            advice += [(NARROWER if wide else SMALLER).format(tower.name)]
    return f"weights and what follows them, {size(whole)} ({parts}): {', '.join(advice)}"


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
