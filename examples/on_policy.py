"""A student learns on texts that it writes itself: from every token, or from the telling half.

A small language model has learned the source of Python's standard library from labels. Now a larger
one corrects it, by reverse KL: on the library's text; or on what the student writes after prompts
(Agarwal et al. 2024, arXiv 2306.13649), where every generated token counts, or a random half of
them, or the half with the highest importance: TIP, which is high where the student is unsure or far
from its teacher (Xu et al. 2026, arXiv 2604.14084), or the divergence alone. All ways get the same
number of tokens. They are compared by how far the student then is from its teacher: on texts that
it writes after prompts nobody trained on, and on the held-out text itself.

What one learns here: ``fxdistill.rollout`` with a ``generate=`` of one's own, ``Importance``, and
``distiller.agreement``.

    python examples/on_policy.py            # three minutes on a CPU
    python examples/on_policy.py --quick    # seconds; nothing is learned
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import mixer
import runs
import stdlib_text
import torch
from stdlib_text import Text
from tiny_decoder import Decoder, heldout_loss, next_token_loss
from torch import Tensor

import fxdistill
from fxdistill import Importance, rollout

STUDENT = {"width": 32, "layers": 2, "heads": 4}
PROMPT, NEW, LABELLED_STEPS = 12, 24, 300
LIBRARY = "the library's text"


def at_random(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """A score that knows nothing: the same share of tokens, and no choice among them."""
    return torch.rand(student_logits.shape[:-1])


WAYS: dict[str, Importance | None] = {
    LIBRARY: None,
    "own texts, every token": None,
    "own texts, a random half": Importance(at_random, keep=0.5),
    "own texts, half by TIP": Importance("tip", keep=0.5),
    "own texts, half by divergence": Importance("divergence", keep=0.5),
}


def sampling(model: Decoder) -> Callable[[Tensor, Tensor], Tensor]:
    """How this model goes on after prompts, at τ = 1; what ``generate=`` takes."""

    def generate(ids: Tensor, mask: Tensor) -> Tensor:
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids)[:, -1].softmax(-1).multinomial(1)], 1)
        return ids

    return generate


def written(model: Decoder, prompts: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    batch = rollout(model, prompts, generator=generator, generate=sampling(model))
    del batch["attention_mask"]  # prompts have one length, and this model takes no mask
    return batch


def texts(way: str, model: Decoder, data: Iterator[Tensor], seed: int) -> Iterator[dict]:
    """A batch a step: what the student writes now, or as many tokens of the library's text."""
    generator = torch.Generator().manual_seed(seed)
    for ids in data:
        if way == LIBRARY:
            yield {
                "input_ids": ids,
                "loss_mask": (torch.arange(ids.shape[1]) >= PROMPT) * (ids >= 0),
            }
        else:
            yield written(model, ids[:, :PROMPT], generator)


def measured(distiller: fxdistill.Distiller, text: Text, count: int) -> dict[str, float]:
    """KL(teacher ‖ student) at τ = 1, on the student's texts and on the library's."""
    model, ids = distiller.student, stdlib_text.windows(text.heldout, count, PROMPT + NEW)
    own = written(model, ids[:, :PROMPT], torch.Generator().manual_seed(0))
    found = {"own": own, "library": {"input_ids": ids}}
    divergences = {name: distiller.agreement(b).divergence.item() for name, b in found.items()}
    return {**divergences, "loss": heldout_loss(model, text, PROMPT + NEW, count)}


def main(argv: Sequence[str] | None = None) -> None:
    options = runs.options(__doc__, argv, steps=150, teacher_steps=1200)
    sizes = mixer.QUICK if options.quick else mixer.SIZES
    measures = {
        "own": "KL from the teacher, on own texts (nats)",
        "library": "on the library's text (nats)",
        "loss": "held-out loss (nats per token)",
    }
    about = {"teacher": sizes, "student": STUDENT, "prompt": PROMPT, "new": NEW}
    count, first_steps = (8, 4) if options.quick else (512, LABELLED_STEPS)
    with runs.Study("on_policy", options, measures, less=measures, sizes=about) as study:
        text = stdlib_text.load(options.out, sizes["vocabulary"])
        teacher = mixer.taught(study, text, sizes)

        def batches(steps: int, seed: int) -> Iterator[Tensor]:
            return stdlib_text.batches(text.train, mixer.BATCH, PROMPT + NEW, steps, seed)

        for seed in options.seeds:
            torch.manual_seed(seed + 1)
            start = Decoder(**{**sizes, **STUDENT})
            data, parameters = batches(first_steps, seed), start.parameters()
            study.train(
                "before",
                lambda x, m=start: next_token_loss(m, x),
                parameters,
                data,
                first_steps,
                lr=4e-3,
            )
            for way, importance in {"before": None, **WAYS}.items():
                student = copy.deepcopy(start)
                # On two cores each of these graphs would compile for half a minute.
                distiller = fxdistill.wrap(
                    student,
                    teacher,
                    logit_loss="reverse_kl",
                    importance=importance,
                    task="causal_lm",
                    compile=False,
                )
                if way in WAYS:
                    data = texts(way, student, batches(options.steps, 100 + seed), seed)
                    rest = (distiller.parameters(), data, options.steps)
                    study.train(way, lambda b, run=distiller: run(**b).loss, *rest, lr=2e-3)
                found = measured(distiller, text, count)
                study.note(way, reference=way not in WAYS, **found)


if __name__ == "__main__":
    main()
