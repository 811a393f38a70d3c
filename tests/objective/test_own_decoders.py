"""Encoder-decoders whose teacher reads, and writes, other tokens than the student."""

import pytest
import torch
from torch import nn

import fxdistill
from families import FAMILIES
from fxdistill import Match, errors

AOT = {"backend": "aot_eager"}
PATHS = {
    "t5": ("encoder.block.0", "decoder.block.0"),
    "bart": ("model.encoder.layers.0", "model.decoder.layers.0"),
}


def inputs(length, decoder_length, seed):
    generator = torch.Generator().manual_seed(seed)
    kept, after = torch.tensor([[length], [2]]), torch.tensor([[1], [decoder_length]])
    return {
        "input_ids": torch.randint(3, 60, (2, length), generator=generator),
        "attention_mask": (torch.arange(length) < kept).long(),
        "decoder_input_ids": torch.randint(3, 60, (2, decoder_length), generator=generator),
        "decoder_attention_mask": (torch.arange(decoder_length) < after).long(),
    }


def pooled(model, path, given):
    seen = []
    module = model.get_submodule(path)
    hook = module.register_forward_hook(lambda _, args, out: seen.append(out))
    model(**given)
    hook.remove()
    value = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    of = "decoder_attention_mask" if "decoder" in path else "attention_mask"
    mask = given[of].unsqueeze(-1)
    return (value * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("laid_over", ["teacher_inputs", "student_inputs", "both"])
@pytest.mark.parametrize(("name", "compile"), [("t5", False), ("bart", False), ("bart", AOT)])
def test_both_streams_of_a_teacher_are_pooled_by_its_own_masks(name, compile, laid_over):
    family = FAMILIES[name]()
    student, teacher = family.student.eval(), family.teacher.eval()
    match = [Match(p, p, reduce=("b l d -> b d", "mean")) for p in PATHS[name]]
    ours, theirs = inputs(7, 5, 1), inputs(9, 6, 2)  # of unequal lengths in both streams
    distiller = fxdistill.wrap(student, teacher, match, logit_loss=None, compile=compile)
    call = {
        "teacher_inputs": {**ours, "teacher_inputs": theirs},
        "student_inputs": {**theirs, "student_inputs": ours},
        "both": {"student_inputs": ours, "teacher_inputs": theirs},
    }
    out = distiller(**call[laid_over])
    wanted = [
        (pooled(student, p, ours) - pooled(teacher, p, theirs).detach()).square().mean()
        for p in PATHS[name]
    ]
    for path, value in zip(PATHS[name], wanted, strict=True):
        torch.testing.assert_close(out.losses[path], value.detach())
    out.loss.backward()
    found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    (sum(wanted) / 2).backward()
    for n, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[n], p.grad, rtol=1e-4, atol=1e-6, msg=n)


class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("compile", [False, "regional", AOT])
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_of_no_class_is_named(compile, label):
    """Torch says no more than that an index is out of bounds."""
    distiller = fxdistill.wrap(Classes(), Classes(), task="classification", compile=compile)
    with pytest.raises(errors.BatchError, match=rf"labels hold {label}, .* 3 classes: 0 to 2"):
        distiller(torch.randn(2, 4), labels=torch.tensor([0, label]))
    distiller(torch.randn(2, 4), labels=torch.tensor([0, -100])).loss.backward()
