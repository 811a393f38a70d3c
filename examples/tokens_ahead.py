"""A student that predicts two tokens (MTP): labels for both heads, the teacher for the first.

A small language model has, besides its own head, a block more that predicts the token after the
next one (Gloeckle et al. 2024, arXiv 2404.19737). It learns the source of Python's standard library
from labels of its own head; from labels of both; and, besides, from a larger model's logits: for
the first head, which is what a teacher with one head can say, or also for the second, which is
compared with what the teacher predicts for the same token, having seen one token more.

What one learns here: ``Head(":mtp_logits[0]", shift=2)`` names logits in the student's own output,
and how far they look ahead; by default a head learns from labels alone.

    python examples/tokens_ahead.py            # two minutes on a CPU
    python examples/tokens_ahead.py --quick    # seconds; nothing is learned
"""

from collections.abc import Sequence

import mixer
import runs
import stdlib_text
import torch
import torch.nn.functional as F
from stdlib_text import Text
from tiny_decoder import Block, Decoder
from torch import Tensor, nn

import fxdistill
from fxdistill import Head

STUDENT = {"width": 48, "layers": 2, "heads": 4}
QUICK = {"width": 16, "layers": 1, "heads": 2}
LABELS = {"second": Head(":mtp_logits[0]", shift=2)}
BOTH = {"second": Head(":mtp_logits[0]", shift=2, logit_weight=1.0)}
WAYS: dict[str, dict] = {
    "labels of one head": {"logit_loss": None},
    "labels of both": {"logit_loss": None, "heads": LABELS},
    "labels of both, logits of the first": {"heads": LABELS},
    "labels and logits of both": {"heads": BOTH},
}


class Predictor(Decoder):
    """Ids ``[B, L]`` to ``logits`` of the next token, and ``mtp_logits[0]`` of the one after it."""

    def __init__(self, width: int, heads: int, **sizes: int) -> None:
        super().__init__(width=width, heads=heads, **sizes)
        self.ahead, self.ahead_norm = Block(width, heads), nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> dict:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        second = self.head(self.ahead_norm(self.ahead(x)))
        return {"logits": self.head(self.norm(x)), "mtp_logits": [second]}


@torch.no_grad()
def measured(model: Predictor, text: Text, length: int) -> dict[str, float]:
    """Losses of both heads on held-out files; how many second tokens both heads choose alike."""
    model.eval()
    found = []
    for ids in stdlib_text.windows(text.heldout, 256, length).split(32):
        out = model(ids)
        first, second = out["logits"][:, 1:-1], out["mtp_logits"][0][:, :-2]  # of the same token
        losses = [F.cross_entropy(z.flatten(0, 1), ids[:, 2:].flatten()) for z in (first, second)]
        alike = (first.argmax(-1) == second.argmax(-1)).float().mean()
        found.append(torch.stack([*losses, 100 * alike]))
    model.train()
    return dict(zip(("loss", "second", "alike"), torch.stack(found).mean(0).tolist(), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=300, teacher_steps=1200)
    sizes = mixer.QUICK if options.quick else mixer.SIZES
    own = QUICK if options.quick else STUDENT
    measures = {
        "loss": "held-out loss (nats per token)",
        "second": "of the second head",
        "alike": "agreement of both heads (%)",
    }
    about = {"teacher": sizes, "student": own}
    less = ["loss", "second"]
    with runs.Study("tokens_ahead", options, measures, less=less, sizes=about) as study:
        text = stdlib_text.load(options.out, sizes["vocabulary"])
        teacher = mixer.taught(study, text, sizes)
        for seed in options.seeds:
            for way, recipe in WAYS.items():
                torch.manual_seed(seed + 1)
                student = Predictor(**{**sizes, **own})
                # On two cores each of these graphs would compile for half a minute.
                given = {"task": "causal_lm", "compile": False, **recipe}
                distiller = fxdistill.wrap(student, teacher, **given)
                place = (mixer.BATCH, sizes["length"], options.steps, seed)
                data = stdlib_text.batches(text.train, *place)

                def loss(ids: Tensor, run=distiller) -> Tensor:
                    return run(ids, labels=ids).loss

                study.train(way, loss, distiller.parameters(), data, options.steps, lr=4e-3)
                found = measured(student, text, sizes["length"])
                untrained = "heads" not in recipe
                study.note(way, **({"loss": found["loss"]} if untrained else found))


if __name__ == "__main__":
    main()
