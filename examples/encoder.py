"""DistilBERT and TinyBERT: an encoder half as deep learns from BERT, on real text.

Teacher and student are built from configurations, and read the source of Python's standard library
in windows of 16 tokens, of which 20 % are masked. The student learns from labels alone; from labels
and logits; from the three losses of DistilBERT (Sanh et al. 2019, arXiv 1910.01108: labels, logits
at τ = 2, the direction of hidden states), with its weights: 5 of logits, 2 of labels, 1 of
directions; and as TinyBERT does (Jiao et al. 2020, arXiv 1909.10351), first from embeddings, hidden
states and the scores of attention, then from logits. DistilBERT's student starts from every second
layer of its teacher; here all start from random weights, so that only the losses differ.

What one learns here: a masked language model as ``distiller(input_ids=..., labels=...)``, maps of
attention that no model makes, and a recipe of two stages.

    python examples/encoder.py            # five minutes on a free CPU
    python examples/encoder.py --quick    # seconds; nothing is learned
"""

from collections.abc import Iterator, Sequence
from functools import partial

import runs
import stdlib_text
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import fxdistill
from fxdistill import Match, losses

SIZES = {"vocabulary": 300, "teacher_width": 96, "student_width": 48, "layers": 4, "length": 16}
QUICK = {**SIZES, "teacher_width": 16, "student_width": 8}
BATCH, MASK = 64, 2  # the token that stands for a hidden one; the text has none of its own
PAIRS = [(0, 1), (1, 3)]  # layers of the student and of the teacher
LAYER, SELF = "bert.encoder.layer", "attention.self"
ALONE = {"logit_loss": None, "label_loss": None}
SCORES = {
    "loss": partial(losses.attention_mse, scores=True),
    "student_port": "attention",
    "teacher_port": "attention",
}
DISTILBERT = {
    "mapping": [Match(f"{LAYER}.1", f"{LAYER}.3", loss="cosine", project="auto")],
    "logit_weight": 5.0,
    "temperature": 2.0,
    "label_weight": 2.0,
}
TINYBERT = {
    "mapping": [
        Match("bert.embeddings", "bert.embeddings", project="auto"),
        *(Match(f"{LAYER}.{s}", f"{LAYER}.{t}", project="auto") for s, t in PAIRS),
        *(Match(f"{LAYER}.{s}.{SELF}", f"{LAYER}.{t}.{SELF}", **SCORES) for s, t in PAIRS),
    ],
    **ALONE,
}
WAYS = {  # stages, each with its share of the steps
    "labels alone": [({"logit_loss": None}, 1.0)],
    "labels, logits": [({}, 1.0)],
    "DistilBERT": [(DISTILBERT, 1.0)],
    "TinyBERT": [(TINYBERT, 0.4), ({"label_loss": None}, 0.6)],
}


def bert(sizes: dict, width: int, layers: int, seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=sizes["length"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def masked(ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """20 % of the tokens hidden; only these are labels."""
    hidden = torch.rand(ids.shape, generator=generator) < 0.2
    labels = ids.masked_fill(~hidden, -100)
    return {"input_ids": ids.masked_fill(hidden, MASK), "labels": labels}


def batches(ids: Tensor, sizes: dict, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for window in stdlib_text.batches(ids, BATCH, sizes["length"], steps, seed):
        yield masked(window, generator)


@torch.no_grad()
def heldout_loss(model: nn.Module, text: stdlib_text.Text, sizes: dict) -> float:
    """Nats per hidden token, on files that nobody trained on; the same tokens are always hidden."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    parts = stdlib_text.windows(text.heldout, 1024, sizes["length"]).split(256)
    found = [model(**masked(ids, generator)).loss for ids in parts]
    model.train()
    return torch.stack(found).mean().item()


def taught(study: runs.Study, text: stdlib_text.Text, sizes: dict) -> BertForMaskedLM:
    """The one teacher of all seeds."""
    model, steps = (
        bert(sizes, sizes["teacher_width"], sizes["layers"], 0),
        study.options.teacher_steps,
    )
    data = batches(text.train, sizes, steps, 0)
    given = (model, lambda batch: model(**batch).loss, data, steps)
    study.taught("teacher", *given, lr=7e-4, made_of=(sizes, text.digest))
    study.note("teacher", reference=True, loss=heldout_loss(model, text, sizes))
    return model


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=500, teacher_steps=3000)
    sizes = QUICK if options.quick else SIZES
    measures = {"loss": "held-out loss (nats per hidden token)"}
    with runs.Study("encoder", options, measures, less=["loss"], sizes=sizes) as study:
        text = stdlib_text.load(options.out, sizes["vocabulary"])
        teacher = taught(study, text, sizes)
        for seed in options.seeds:
            for way, stages in WAYS.items():
                student = bert(sizes, sizes["student_width"], len(PAIRS), seed + 1)
                for number, (recipe, share) in enumerate(stages):
                    # On two cores each of these graphs would compile for half a minute.
                    distiller = fxdistill.wrap(student, teacher, **recipe, compile=False)
                    steps = max(1, round(share * options.steps))
                    data = batches(text.train, sizes, steps, 10 * seed + number)
                    rest = (distiller.parameters(), data, steps)
                    study.train(way, lambda batch, d=distiller: d(**batch).loss, *rest, lr=2e-3)
                study.note(way, loss=heldout_loss(student, text, sizes))


if __name__ == "__main__":
    main()
