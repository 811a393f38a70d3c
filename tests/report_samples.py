"""Reports made by hand, for the tests of their faces. Numbers are of the right size, no more."""

from dataclasses import replace

from fxdistill.report.data import (
    SCHEMA,
    BlockLine,
    Cast,
    Change,
    Collective,
    Event,
    Flops,
    Memory,
    Moment,
    Pair,
    PassLine,
    Plain,
    TermLine,
    TowerFacts,
    Value,
)
from fxdistill.report.report import Report

MiB = 2**20
GiB = 2**30


def blocks(layers, width, inner, vocabulary, *, tokens, learns, deepest=None):
    """A Llama's parts. Above the teacher's deepest tap nothing runs."""
    attention, mlp = 4 * width * width, 3 * width * inner
    each = attention + mlp + 2 * width
    embedding = BlockLine("model.embed_tokens", (), vocabulary * width)
    stack = []
    for i in range(layers):
        kinds = (
            (f"model.layers.{i}.self_attn", "attention"),
            (f"model.layers.{i}.mlp", "MLP"),
        )
        runs = 2 * each * tokens if deepest is None or i <= deepest else 0
        stack.append(BlockLine(f"model.layers.{i}", kinds, each, runs, 2 * runs if learns else 0))
    head = 2 * vocabulary * width * tokens if deepest is None else 0
    norm = BlockLine("model.norm", (), width, 8 * width * tokens if deepest is None else 0)
    last = BlockLine("lm_head", (), vocabulary * width, head, 2 * head if learns else 0)
    return (embedding, *stack, norm, last)


def towers(student, teacher, projections=0, dtype="torch.bfloat16", size=2):
    ours = sum(block.parameters for block in student)
    theirs = sum(block.parameters for block in teacher)
    both = (
        TowerFacts("student", "LlamaForCausalLM", ours, ours, size * ours, (dtype,), True, student),
        TowerFacts(
            "teacher", "Llama4ForCausalLM", theirs, 0, size * theirs, (dtype,), False, teacher
        ),
    )
    if not projections:
        return both
    made = TowerFacts(
        "projections", "2 × Linear", projections, projections, size * projections, (dtype,), True
    )
    return (both[1], both[0], made)  # in the order that they are in the graph


def pairs(layer_map, tokens, ours, theirs, dtype, *, between="", loss="mse", placements=((), ())):
    found = []
    for s, t in layer_map:
        for part in ("self_attn", "mlp"):
            path = f"model.layers.{s}.{part}"
            found.append(
                Pair(
                    name=path,
                    student=path,
                    teacher=f"model.layers.{t}.{part}",
                    loss=loss,
                    weight=1.0,
                    between=between,
                    student_value=Value((*tokens, ours), dtype, placements[0]),
                    teacher_value=Value((*tokens, theirs), dtype, placements[1]),
                )
            )
    return tuple(found)


def flops_of(student, teacher, losses, projections, again):
    run = sum(b.forward for b in teacher)
    forward, backward = sum(b.forward for b in student), sum(b.backward for b in student)
    total = run + forward + backward + losses + projections + again
    return Flops(run, forward, backward, losses, projections, again, total)


def timeline(students, teachers, weights, unit):
    """Teacher and student forward, the losses, and the backward, which frees what it has read."""
    moments = []

    def add(phase, at, **held):
        moments.append(Moment(phase, at, {"weights": weights, **held}))

    for i in range(teachers):
        wave = unit * (2 if i % 2 else 3)
        add("forward", f"teacher model.layers.{i}", teacher=wave, taps=unit * i // 3)
    taps = unit * teachers // 3
    for i in range(students):
        add("forward", f"model.layers.{i}.self_attn", student=unit * (6 * i + 4), taps=taps)
        add("forward", f"model.layers.{i}.mlp", student=unit * (6 * i + 7), taps=taps)
    full = unit * 6 * students
    add("forward", "losses", student=full, taps=taps, head=4 * unit, losses=3 * unit)
    add("forward", "losses", student=full, taps=taps, head=9 * unit, losses=5 * unit)
    for i in reversed(range(students)):
        left, made = unit * (6 * i + 7), unit * 2 * (students - i)
        kept = taps * i // students
        add(
            "backward",
            f"model.layers.{i}.mlp",
            student=left,
            taps=kept,
            losses=unit,
            gradients=made,
        )
        add("backward", f"model.layers.{i}.self_attn", student=left, taps=kept, gradients=made)
    return tuple(moments)


def memory_of(both, moments, saved, taps, head, transient):
    worst = max(moments, key=lambda moment: moment.total)
    learned = sum(t.trainable for t in both)
    return Memory(
        weights={tower.name: tower.bytes for tower in both},
        gradients=2 * learned,
        optimizers={"AdamW": 8 * learned, "SGD with momentum": 4 * learned, "SGD": 0},
        saved=saved,
        taps=taps,
        head=head,
        transient=transient,
        peak=worst.total,
        peak_at=worst.at,
        timeline=moments,
    )


EXPOSED = tuple(f"model.layers.{i}.{part}" for i in (1, 3, 5) for part in ("self_attn", "mlp"))
PASSES = (
    PassLine(
        "ExposeOutputs",
        "teacher",
        "captured",
        True,
        Change(412, 418),
        None,
        None,
        EXPOSED,
        (),
        0.012,
    ),
    PassLine(
        "FuseHead",
        "joint",
        "captured",
        True,
        Change(436, 421),
        Change(2_410_000_000, 2_410_000_000),
        Change(96 * MiB, 31 * MiB),
        (),
        ("student and teacher logits are never made: labels, logits in chunks of 1024 tokens",),
        0.034,
    ),
    PassLine(
        "PruneTeacher",
        "joint",
        "captured",
        True,
        Change(421, 389),
        Change(2_410_000_000, 2_150_000_000),
        Change(31 * MiB, 29 * MiB),
        (),
        ("32 nodes removed: model.layers.5 and model.norm of the teacher",),
        0.008,
    ),
    PassLine(
        "KeepTeacher", "backward", "joint", False, Change(912, 912), None, None, (), (), 0.004
    ),
)


def small():
    """3 layers from 6, as in the README."""
    tokens = (8, 128)
    ours = blocks(3, 128, 512, 4096, tokens=1024, learns=True)
    theirs = blocks(6, 256, 1024, 4096, tokens=1024, learns=False)
    both = towers(ours, theirs, 65_536, "torch.float32", 4)
    weights = sum(tower.bytes for tower in both)
    moments = timeline(3, 6, weights, 1 * MiB)
    flops = flops_of(ours, theirs, 9_000_000_000, 400_000_000, 0)
    return Report(
        schema=SCHEMA,
        fxdistill="0.1.0",
        torch="2.13.0",
        mode="one graph",
        backend="inductor",
        mesh={},
        inputs={
            "input_ids": Value(tokens, "torch.int64"),
            "attention_mask": Value(tokens, "torch.int64"),
            "labels": Value(tokens, "torch.int64"),
        },
        towers=both,
        pairs=pairs(
            [(0, 1), (1, 3), (2, 5)], tokens, 128, 256, "torch.float32", between="Linear 128 → 256"
        ),
        terms=(
            TermLine("logits", "forward_kl", 1.0),
            TermLine("labels", "cross_entropy", 0.5),
            TermLine("features", "mean over 6 matches", 0.1),
        ),
        passes=PASSES,
        nodes={"teacher": 148, "student": 201, "objective": 40},
        flops=flops,
        memory=memory_of(both, moments, 18 * MiB, 6 * MiB, 9 * MiB, 5 * MiB),
        plain=Plain(3 * flops.forward, weights // 3 + 52 * MiB),
        events=(Event("capture", "first call, shapes [8, 128]"),),
        notes=("head fused: logits are not made; outputs=('logits',) makes them",),
    )


def large():
    """A Llama of 32 layers from one of 80, every mixer and MLP."""
    tokens = (1, 4096)
    layer_map = [(i, (i + 1) * 80 // 32 - 1) for i in range(32)]
    ours = blocks(32, 4096, 14336, 128256, tokens=4096, learns=True)
    theirs = blocks(80, 8192, 28672, 128256, tokens=4096, learns=False)
    both = towers(ours, theirs, 2 * 4096 * 8192)
    weights = sum(tower.bytes for tower in both)
    moments = timeline(32, 80, weights, 224 * MiB)
    flops = flops_of(ours, theirs, 31 * 10**12, 2 * 10**12, 9 * 10**12)
    report = small()
    return replace(
        report,
        mesh={},
        inputs={"input_ids": Value(tokens, "torch.int64"), "labels": Value(tokens, "torch.int64")},
        towers=both,
        pairs=pairs(layer_map, tokens, 4096, 8192, "torch.bfloat16", between="Linear 4096 → 8192"),
        terms=(
            TermLine("logits", "forward_kl", 1.0),
            TermLine("labels", "cross_entropy", 1.0),
            TermLine("features", "mean over 64 matches", 0.1),
        ),
        nodes={"teacher": 3264, "student": 2211, "objective": 418},
        flops=flops,
        memory=memory_of(both, moments, 43 * GiB, 6 * GiB, 2 * GiB, 3 * GiB),
        plain=Plain(3 * flops.forward, 2 * both[1].bytes + 45 * GiB),
        casts=(Cast("student", "torch.bfloat16", "torch.float32", 65),),
        warnings=(
            "The teacher's config asks for dropout 0.1: under freeze_teacher it is ignored.",
            "Token weights do not reach model.vision.0: its leading axes are not the tokens'.",
        ),
    )


def mesh():
    """Tensor and data parallel: values have placements, and ranks talk."""
    report = small()
    sharded = (("Replicate()", "Shard(dim=1)"), ("Replicate()", "Partial(sum)"))
    return replace(
        report,
        mesh={"dp": 4, "tp": 8},
        pairs=pairs([(0, 1), (1, 3), (2, 5)], (8, 128), 128, 128, "torch.float32", loss="cosine",
                    placements=sharded),
        collectives=(
            Collective("student", "all_gather_into_tensor", 14, 37 * MiB),
            Collective("student", "reduce_scatter_tensor", 14, 19 * MiB),
            Collective("teacher", "all_gather_into_tensor", 24, 88 * MiB),
            Collective("terms", "all_reduce", 1, 32),
        ),
        events=(
            Event("capture", "first call"),
            Event("recompile", "L['input_ids'].size()[1] is 96, was 128: shapes are static here"),
        ),
    )  # fmt: skip


def partial():
    """Capture failed: what is known without it."""
    report = small()
    return replace(
        report,
        pairs=tuple(replace(p, student_value=None, teacher_value=None) for p in report.pairs),
        passes=(),
        nodes={},
        flops=None,
        memory=None,
        plain=None,
        events=(),
        notes=(),
        stopped="CaptureError: the student cannot be captured: .item() at modeling_toy.py:41",
    )


NASTY = "<script>alert('x')</script> & \"Model\" [bold]{{style}}[/bold] </script>"


def nasty():
    """Markup of every kind in names, and no pairs."""
    report = small()
    block = BlockLine(NASTY, ((NASTY, NASTY),), 1)
    towers = tuple(
        TowerFacts(name, NASTY, 1, 0, 4, (NASTY,), False, (block,))
        for name in ("student", "teacher")
    )
    return replace(
        report,
        towers=towers,
        mesh={},
        inputs={NASTY: Value((1,), NASTY)},
        pairs=(),
        terms=(TermLine(NASTY, NASTY, 1.0),),
        passes=(replace(PASSES[0], name=NASTY, remarks=(NASTY,)),),
        events=(Event(NASTY, NASTY),),
        warnings=(NASTY,),
        notes=(NASTY,),
    )


ALL = {
    "small": small,
    "large": large,
    "mesh": mesh,
    "partial": partial,
    "nasty": nasty,
}
