"""Students whose targets are each other's logits: read their heads and losses, and fuse them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fxdistill.base.tensors import is_placed
from fxdistill.graph.effects import Effects
from fxdistill.heads.curve import Unreadable
from fxdistill.heads.read_head import Head, is_cut, read_head, value_of
from fxdistill.heads.read_total import Summand
from fxdistill.heads.readers import (
    read_as,
    require_learns,
    require_readers,
    require_vocabulary,
)
from fxdistill.heads.replace import item, mark_as_objective, remark_on, replace_summands
from fxdistill.heads.surroundings import require_same_surroundings
from fxdistill.losses.fused.formulas import Divergence
from fxdistill.losses.fused.sizes import chunk_tokens_for
from fxdistill.losses.mixture import mean_of_teachers
from fxdistill.losses.vocab_peers import Peer, PeerLosses, vocab_loss_of_peers


@dataclass(frozen=True)
class _Target:
    """What a divergence compares with: the logits that it is made of, and the nodes between."""

    made: fx.Node
    sources: tuple[fx.Node, ...]
    mean: fx.Node | None
    between: tuple[fx.Node, ...]
    detached: bool  # all sources are
    mix: tuple[Divergence, ...]

    @classmethod
    def read(cls, divergence: Summand, logits: Sequence[fx.Node]) -> "_Target":
        """Read the one target of these losses; the walk ends at any student's ``logits``."""
        made = divergence.argument(1)
        mean = made if made.target is mean_of_teachers else None
        ends: Any = [made] if mean is None else mean.args[0]
        sources, between, detached = [], [] if mean is None else [mean], True
        for node in ends:
            constant = False
            while node not in logits and _is_passed_on(node):
                constant = constant or node.target == "detach"
                between.append(node)
                node = node.args[0]
            sources.append(node)
            detached = detached and constant
        return cls(made, tuple(sources), mean, tuple(between), detached, divergence.mix)

    @classmethod
    def all_of(cls, divergence: Summand, logits: Sequence[fx.Node]) -> "tuple[_Target, ...]":
        """Read the targets, where the term is the mean over several."""
        parts: dict[fx.Node, list[tuple[float, fx.Node]]] = {}
        for part in divergence.parts:
            parts.setdefault(replace(divergence, parts=(part,)).argument(1), []).append(part)
        of_each = [replace(divergence, parts=tuple(some)) for some in parts.values()]
        found = tuple(cls.read(each, logits) for each in of_each)
        if len({target.mix for target in found}) > 1:
            raise Unreadable("the losses from single peers differ")
        return found


def _is_passed_on(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and (node.target == "detach" or is_cut(node, source))


@dataclass(frozen=True)
class _Student:
    """One student: its head, its losses, and what its divergence compares with."""

    head: Head
    divergence: Summand | None
    labelled: Summand | None
    targets: tuple[_Target, ...]

    @property
    def summands(self) -> tuple[Summand, ...]:
        return tuple(s for s in (self.divergence, self.labelled) if s is not None)


def read_peers(
    graph: fx.Graph, effects: Effects, stack: fx.Node, groups: list[list[Summand]]
) -> "PeerFusion | None":
    """Read students that learn from each other; ``None`` where none learns from another.

    ``groups`` are the losses on the logits of each student. Raises Unreadable where such students
    cannot be fused.
    """
    logits = [_logits(group) for group in groups]
    targets = [_targets(group, logits) for group in groups]
    every = [target for some in targets for target in some]
    if not any(source in logits for target in every for source in target.sources):
        return None
    allowed = {loss for group in groups for summand in group for loss in summand.losses}
    for target in every:
        if not set(target.sources) <= set(logits):
            raise Unreadable("students learn from each other and from another teacher")
        if not target.detached:
            raise Unreadable("what a student learns from another is no constant")
        allowed.update(target.between)
    students = [
        _student(group, node, some, allowed)
        for group, node, some in zip(groups, logits, targets, strict=True)
    ]
    if len({value_of(s.head.linear).dtype for s in students}) > 1:
        raise Unreadable("the students' logits differ in dtype")
    if len({s.labelled is None for s in students}) > 1:
        raise Unreadable("some students learn from labels and others do not")
    for student in students:
        require_same_surroundings(graph, effects, stack, student.head, ())
    return PeerFusion(graph, stack, tuple(students), tuple(logits))


def _logits(group: list[Summand]) -> fx.Node:
    """The logits of one student: those that the label loss reads, or else all columns there are."""
    for summand in group:
        if not summand.is_divergence:
            return summand.argument(0)
    node = group[0].argument(0)
    while _is_passed_on(node) and node.target != "detach":
        node = node.args[0]  # type: ignore[assignment]
    return node


def _targets(group: list[Summand], logits: Sequence[fx.Node]) -> tuple[_Target, ...]:
    found = [_Target.all_of(summand, logits) for summand in group if summand.is_divergence]
    return found[0] if found else ()


def _student(
    group: list[Summand], logits: fx.Node, targets: tuple[_Target, ...], allowed: set[fx.Node]
) -> _Student:
    divergences = [s for s in group if s.is_divergence]
    labelled = [s for s in group if not s.is_divergence]
    if len(divergences) > 1 or len(labelled) > 1:
        raise Unreadable("a student that learns from others has several losses of one kind")
    divergence = (*divergences, None)[0]
    compared = [s.argument(0) for s in group if s.argument(0) is not logits]
    if labelled and not all(is_cut(node, logits) for node in compared):
        raise Unreadable("divergence and label loss read different logits")
    between = [node for target in targets for node in target.between]
    for node in (logits, *compared, *between):
        require_readers("student", node, allowed | set(compared))
    require_vocabulary(logits)
    head = read_as("student", lambda node: read_head(node, allowed), logits)
    require_learns(head)
    if any(is_placed(value_of(node)) for node in head.inputs):
        raise Unreadable("heads of students that learn from each other are sharded")
    if divergence is not None:
        for target in targets:
            _require_one_scale(divergence, target)
    return _Student(head, divergence, (*labelled, None)[0], targets)


def _require_one_scale(divergence: Summand, target: _Target) -> None:
    """Raise Unreadable unless target and logits are of one shape and one temperature."""
    if value_of(target.made).shape != value_of(divergence.argument(0)).shape:
        raise Unreadable("the logits that are compared differ in shape")
    if target.mean is None or target.mean.kwargs["pooled"] == "logits":
        return
    if target.mean.kwargs.get("temperature", 1.0) is not divergence.option("temperature", 1.0):
        raise Unreadable("peers are averaged at another temperature than they are compared")


@dataclass(frozen=True)
class PeerFusion:
    """The students and losses that one ``vocab_loss_of_peers`` node replaces."""

    graph: fx.Graph
    stack: fx.Node
    students: tuple[_Student, ...]
    logits: tuple[fx.Node, ...]

    def write(self, compiled: bool) -> str:
        """Rewrite the graph, and return the remark."""
        made = [value_of(node) for node in self.logits]
        bytes_each = value_of(self.students[0].head.linear).element_size()
        columns = sum(int(value.shape[-1]) for value in made)
        chunk = chunk_tokens_for(columns, bytes_each, made[0].device)
        old = list(self.graph.nodes)
        with self.graph.inserting_before(self.stack):
            peers: Any = [self._peer(student) for student in self.students]
            how: dict[str, Any] = {
                "pooled": self._pooled(),
                "chunk_tokens": chunk,
                "compile": compiled,
            }
            node = self.graph.call_function(vocab_loss_of_peers, (peers,), how)
            scalar = value_of(self.students[0].summands[0].product)
            each = scalar.new_empty(len(self.students))
            node.meta["example_value"] = PeerLosses(scalar, each, each)
            total, *of_terms = (
                item(self.graph, node, i, value) for i, value in enumerate((scalar, each, each))
            )
            values = [
                (summand, item(self.graph, of_terms[0 if summand.is_divergence else 1], i, scalar))
                for i, student in enumerate(self.students)
                for summand in student.summands
            ]
        mark_as_objective(self.graph, old)
        between = [n for s in self.students for target in s.targets for n in target.between]
        heads = [student.head for student in self.students]
        replace_summands(self.stack, total, values, heads, between)
        said = remark_on(made, chunk, columns * bytes_each)
        return f"{said}; all students' logits of a chunk are made once"

    def _pooled(self) -> str:
        """What targets are the mean of; the same for all students."""
        found = set()
        for targets in (student.targets for student in self.students):
            means = [target.mean for target in targets if target.mean is not None]
            found |= {str(mean.kwargs["pooled"]) for mean in means}
            found |= {"each"} if len(targets) > 1 else set()
        if len(found) > 1:
            raise Unreadable("students average their peers in different ways")
        return (*found, "logits")[0]

    def _peer(self, student: _Student) -> Peer:
        """The arguments of one student: nodes and constants."""
        given: dict[str, Any] = {"divergence": None}
        given["hidden"], given["weight"], given["bias"] = student.head.emit(self.graph)
        given["scale"], given["softcap"] = student.head.curve.scale, student.head.curve.softcap
        if (divergence := student.divergence) is not None:
            targets = student.targets
            sources = [source for target in targets for source in target.sources]
            mean = targets[0].mean
            # The fused form takes the mean over targets itself.
            mix = [(name, factor * len(targets), beta) for name, factor, beta in targets[0].mix]
            given["divergence"] = tuple(mix)
            given["peers"] = tuple(map(self.logits.index, sources))
            given["shares"] = None if mean is None else mean.args[1]
            given["logit_weight"] = divergence.weight
            given["logit_weights"] = divergence.option("weights")
            given["logit_items"] = divergence.items
            given["temperature"] = divergence.option("temperature", 1.0)
            given["vocab_size"] = value_of(divergence.argument(0)).shape[-1]
        if (labelled := student.labelled) is not None:
            given["labels"] = labelled.argument(1)
            given["label_weight"] = labelled.weight
            given["weights"] = labelled.option("weights")
            given["num_items"] = labelled.items
            for name in ("label_smoothing", "z_loss"):
                given[name] = labelled.option(name, 0.0)
        return Peer(**given)
