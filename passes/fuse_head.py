"""Fuse heads with their losses, so that logits which only losses read are never made."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from fxdistill import losses
from fxdistill.base.tensors import is_placed
from fxdistill.errors import ShapeError, VocabularyError
from fxdistill.graph.effects import Effects, effects_of
from fxdistill.graph.program import Level, P, fork_module
from fxdistill.heads.curve import Unreadable
from fxdistill.heads.peer_fusion import PeerFusion, read_peers
from fxdistill.heads.read_head import Head, is_cut, read_head, value_of
from fxdistill.heads.read_total import ON_LOGITS, Scored, Summand, read_total
from fxdistill.heads.readers import (
    read_as,
    require_learns,
    require_readers,
    require_vocabulary,
)
from fxdistill.heads.replace import (
    erase_dead,
    item,
    mark_as_objective,
    remark_on,
    replace_summands,
)
from fxdistill.heads.summands import by_student
from fxdistill.heads.surroundings import require_same_surroundings
from fxdistill.losses import fused
from fxdistill.losses.fused.call import HeadSide
from fxdistill.losses.fused.sizes import chunk_tokens_for
from fxdistill.losses.fused.teachers import columns_of_mean
from fxdistill.losses.mixture import mean_of_teachers
from fxdistill.losses.scores import vocab_scores

if TYPE_CHECKING:
    from fxdistill.losses.fused.sharded_heads import ShardedHeads

_FUSED = {losses.vocab_loss, losses.vocab_loss_of_peers}


@dataclass(frozen=True)
class FuseHead:
    """Replace student and teacher heads and the losses on their logits by ``vocab_loss`` nodes.

    1. The pass looks for hidden state → linear → scale, cap, slice, cast → logits, in student and
       teacher, where only ``logit_weight · divergence`` and ``label_weight · cross_entropy`` read
       the logits.
    2. Where something else reads the logits (an output, a match of the head), or they are made in
       another way, the pass changes nothing, and its remark says why.
    3. Dead code derived from the logits is removed.
    4. Logits ``[B, C]`` of fewer than 4096 classes are left alone: they cost little.
    5. Several teachers whose mean is one target (``mean_of_teachers``) become operands of one node,
       which mixes their logits chunk by chunk; if one head cannot be read, logits are made.
    6. A divergence and the label loss on the same logits become one node. Every further divergence
       (with a teacher of its own), further head and further student gets a node of its own.
    7. Scores of the logits, from which the weights of a divergence follow, become a
       ``vocab_scores`` node. Without a label loss on the same logits, ``vocab_loss`` multiplies
       weights by a score itself, or leaves out the tokens that have none.
    8. Students that learn from each other become one ``vocab_loss_of_peers`` node.

    ``compiled`` says whether the body of a chunk is compiled; ``made`` says why the models made
    their logits before this graph, for the remark.
    """

    compiled: bool = True
    made: str = ""
    level: ClassVar[Level] = "captured"

    def __call__(self, program: P) -> P:
        """Fuse the heads; a program without losses on logits is returned as it is."""
        targets = {node.target for node in program.gm.graph.nodes}
        expected = targets.intersection(ON_LOGITS) or {"logits", "labels"} & set(program.outputs)
        if targets & _FUSED or not expected:
            return program
        gm = fork_module(program.gm)
        try:
            said = [fusion.write(self.compiled) for fusion in _fusions(gm)]
        except Unreadable as why:
            said = [f"logits are made: {why}" + (f"; {self.made}" if self.made else "")]
            return replace(program, remarks=(*program.remarks, *said))
        return replace(program, gm=gm, remarks=(*program.remarks, *said))


def _fusions(gm: fx.GraphModule) -> "list[_Fusion] | list[PeerFusion]":
    """Read every fusion of the graph, before any of them is written."""
    effects = effects_of(gm)
    erase_dead(gm.graph, effects)
    stack, summands = read_total(gm.graph)
    if not summands:
        raise Unreadable("no loss of this library reads them")
    groups = by_student(summands)
    if (peers := read_peers(gm.graph, effects, stack, groups)) is not None:
        return [peers]
    readers = {loss for summand in summands for loss in summand.losses}
    readers |= {scored.scores for summand in summands if (scored := summand.scored) is not None}
    rolled = (s.argument(1) for s in summands if s.is_divergence)
    readers |= {node for node in rolled if node.target is torch.roll}
    pairs = [pair for group in groups for pair in _pairs(group)]
    return [_Fusion.read(gm.graph, effects, stack, pair, readers) for pair in pairs]


def _pairs(group: list[Summand]) -> list[tuple[Summand | None, Summand | None]]:
    """Pair the first divergence of a group with its label loss, and each other one with ``None``.

    Raises Unreadable where divergence and label loss count different tokens.
    """
    divergences: list[Summand | None] = [s for s in group if s.is_divergence]
    labelled = [s for s in group if not s.is_divergence]
    if len(labelled) > 1:
        raise Unreadable("several label losses have weights of their own")
    # Where a divergence weighs tokens by scores, it is known to count those of the label loss.
    counts = {(s.option("weights"), s.items) for s in group if s.scored is None}
    if labelled and len(counts) > 1:
        raise Unreadable("divergence and label loss count different tokens")
    labels = [*labelled, None][0]
    return [(d, labels if i == 0 else None) for i, d in enumerate(divergences or [None])]


@dataclass(frozen=True)
class _Fusion:
    """The heads and summands that one ``vocab_loss`` node replaces."""

    graph: fx.Graph
    stack: fx.Node
    divergence: Summand | None
    labelled: Summand | None
    student: Head
    teachers: tuple[Head, ...]
    layout: "ShardedHeads | None"  # for heads that are sharded
    scored: Scored | None  # the scores that the divergence's weights follow from

    @classmethod
    def read(
        cls,
        graph: fx.Graph,
        effects: Effects,
        stack: fx.Node,
        pair: tuple[Summand | None, Summand | None],
        readers: Collection[fx.Node],
    ) -> "_Fusion":
        divergence, labelled = pair
        student, teachers = _heads(divergence, labelled, readers)
        require_same_surroundings(graph, effects, stack, student, teachers)
        layout = _layout(student, teachers)
        scored = None if divergence is None else divergence.scored
        if len(teachers) > 1 and (layout is not None or scored is not None):
            what = "sharded" if layout is not None else "scored for importance"
            raise Unreadable(f"logits of several teachers are {what}")
        return cls(graph, stack, divergence, labelled, student, teachers, layout, scored)

    @property
    def summands(self) -> tuple[Summand, ...]:
        return tuple(s for s in (self.divergence, self.labelled) if s is not None)

    @property
    def heads(self) -> tuple[Head, ...]:
        return (self.student, *self.teachers)

    def write(self, compiled: bool) -> str:
        """Rewrite the graph, and return the remark."""
        made = [value_of(head.logits) for head in self.heads]
        parts = 1 if self.layout is None else self.layout.parts
        columns = sum(-(-int(value.shape[-1]) // parts) for value in made)
        size = value_of(self.student.linear).element_size()
        if len(self.teachers) > 1:
            columns += columns_of_mean(int(value_of(self._compared).shape[-1]), size)
        chunk = chunk_tokens_for(columns, size, made[0].device)
        old = list(self.graph.nodes)
        if self.scored is not None and not self.score:
            self._write_scores(self.scored.scores, chunk, compiled)
        with self.graph.inserting_before(self.stack):
            args, kwargs = self._arguments()
            kwargs |= {"chunk_tokens": chunk, "compile": compiled}
            node = self.graph.call_function(losses.vocab_loss, tuple(args), kwargs)
            scalar = value_of(self.summands[0].product)
            node.meta["example_value"] = losses.VocabLoss(scalar, scalar, scalar)
            total, *values = (item(self.graph, node, i, scalar) for i in range(3))
        mark_as_objective(self.graph, old)
        told = [(s, values[0 if s.is_divergence else 1]) for s in self.summands]
        read = self.scored.nodes if self.score and self.scored is not None else ()
        replace_summands(self.stack, total, told, self.heads, read)
        said = remark_on(made, chunk, columns * size)
        if self.score:
            said += "; tokens are scored in the same pass"
        elif self.scored is not None:
            said += "; tokens are scored first"
        if self.kept is not None:
            said += f", and {self.kept[0] / self.kept[1]:.3g} of them go through the heads again"
        return said if self.layout is None else f"{said}; {self.layout.how}"

    @property
    def kept(self) -> tuple[int, int] | None:
        """The share of tokens that the heads are applied to; ``None`` for all of them."""
        alone = self.labelled is None and self.layout is None
        return self.scored.keep if alone and self.scored is not None else None

    @property
    def score(self) -> str:
        """The score that the loss itself multiplies the weights by, where it can."""
        alone = self.labelled is None and self.layout is None
        return self.scored.score if alone and self.scored is not None else ""

    def _write_scores(self, scores: fx.Node, chunk: int, compiled: bool) -> None:
        """Replace scores of logits by those of the heads, at their place."""
        with self.graph.inserting_before(scores):
            args, kwargs = self._of_heads()
            kwargs |= {**scores.kwargs, "vocab_size": value_of(self._compared).shape[-1]}
            kwargs |= {"chunk_tokens": chunk, "compile": compiled}
            node = self.graph.call_function(vocab_scores, tuple(args), kwargs)
        node.meta["example_value"] = value_of(scores)
        scores.replace_all_uses_with(node)
        self.graph.erase_node(scores)

    @property
    def _compared(self) -> fx.Node:
        assert self.divergence is not None
        return self.divergence.argument(0)

    def _of_heads(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments that say what the heads are: nodes and constants."""
        kwargs: dict[str, Any] = {}
        args: list[Any] = []
        teacher = self.teachers[0] if self.teachers else None
        for tower, head in (("student", self.student), ("teacher", teacher)):
            hidden, weight, bias = (None,) * 3 if head is None else head.emit(self.graph)
            args += [hidden, weight]
            if head is not None:
                curve = {"scale": head.curve.scale, "softcap": head.curve.softcap, "bias": bias}
                kwargs |= {f"{tower}_{name}": value for name, value in curve.items()}
        return args, kwargs

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of ``vocab_loss``: nodes and constants."""
        args, kwargs = self._of_heads()
        kwargs["divergence"] = None
        if self.labelled is not None:
            args.append(self.labelled.argument(1))
            kwargs["label_weight"] = self.labelled.weight
            for name in ("label_smoothing", "z_loss"):
                kwargs[name] = self.labelled.option(name, 0.0)
        if self.divergence is not None:
            kwargs["divergence"] = self.divergence.mix
            kwargs["logit_weight"] = self.divergence.weight
            kwargs["temperature"] = self.divergence.option("temperature", 1.0)
            kwargs["vocab_size"] = value_of(self._compared).shape[-1]
            kwargs |= self._of_other_teachers()
            if self.labelled is not None and self.scored is not None:
                kwargs["logit_weights"] = self.divergence.option("weights")
                kwargs["logit_items"] = self.divergence.items
        kwargs["keep"] = self.kept
        kwargs["weights"] = self.summands[-1].option("weights")
        if self.score and self.scored is not None:
            kwargs |= {"weights": self.scored.plain, "score": self.score}
        kwargs["num_items"] = self.summands[-1].items
        return args, kwargs

    def _of_other_teachers(self) -> dict[str, Any]:
        """The arguments of the mean of several teachers: heads behind the first, and weights."""
        assert self.divergence is not None
        if len(self.teachers) < 2:
            return {}
        mean = self.divergence.argument(1)
        others = tuple(
            (*head.emit(self.graph), head.curve.scale, head.curve.softcap)
            for head in self.teachers[1:]
        )
        pooled = mean.kwargs.get("pooled", "probabilities")
        return {"other_teachers": others, "teacher_shares": mean.args[1], "pooled": pooled}


def _heads(
    divergence: Summand | None, labelled: Summand | None, losses: Collection[fx.Node]
) -> tuple[Head, tuple[Head, ...]]:
    """The heads of student and teachers; raises Unreadable where they cannot be fused."""
    found = [s.argument(0) for s in (labelled, divergence) if s is not None]
    logits, compared = found[0], found[-1]
    readers = set(losses)
    if compared is not logits:  # the divergence reads no padding columns, the label loss does
        if not is_cut(compared, logits):
            raise Unreadable("divergence and label loss read different logits")
        require_readers("student", compared, readers)
    for cut in [user for user in logits.users if is_cut(user, logits)]:
        require_readers("student", cut, losses)
        readers.add(cut)
    require_readers("student", logits, readers)
    require_vocabulary(logits)
    student = read_as("student", read_head, logits)
    require_learns(student)
    if divergence is None:
        return student, ()
    theirs = divergence.argument(1)
    if value_of(theirs).shape != value_of(compared).shape:
        raise Unreadable("the logits that are compared differ in shape")
    require_readers("teacher", theirs, readers)
    found = [theirs]
    if theirs.target is mean_of_teachers:
        found = list(theirs.args[0])  # type: ignore[arg-type]
        readers.add(theirs)
        tau = theirs.kwargs.get("temperature", 1.0)
        if tau is not divergence.option("temperature", 1.0) and theirs.kwargs["pooled"] != "logits":
            raise Unreadable("teachers are averaged at another temperature than they are compared")
    return student, tuple(_teacher(node, readers) for node in found)


def _teacher(logits: fx.Node, readers: Collection[fx.Node]) -> Head:
    require_readers("teacher", logits, readers)
    head = read_as("teacher", functools.partial(read_head, readers=readers), logits)
    if not head.detached:
        raise Unreadable("the teacher learns too, and the fused form gives it no gradient")
    return head


def _layout(student: Head, teachers: Sequence[Head]) -> "ShardedHeads | None":
    """How ``vocab_loss`` reads sharded heads; ``None`` for heads on one device."""
    heads = [student, *teachers]
    if not any(is_placed(value_of(node)) for head in heads for node in head.inputs):
        return None
    sides = [
        HeadSide(
            value_of(head.hidden),
            value_of(head.weight),
            None if head.bias is None else value_of(head.bias),
        )
        for head in heads
    ]
    try:
        other = sides[1] if teachers else None
        layout: ShardedHeads = fused.sharded_heads.sharded_heads_of(sides[0], other)
    except (ShapeError, VocabularyError) as error:
        raise Unreadable(str(error)) from None
    return layout
