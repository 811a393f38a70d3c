"""Rollouts: what a batch holds, whose random numbers are drawn, and what is put back."""

import pytest
import torch
import transformers as hf
from torch import nn

import fxdistill
from fxdistill import rollout
from fxdistill.errors import BatchError, OptionError, ShapeError
from toys import Toy

V, PAD, END = 32, 0, 2


def llama(layers=2, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 24}
    special = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END}
    config = hf.LlamaConfig(vocab_size=V, **sizes, **heads, **special, **options)
    return hf.LlamaForCausalLM(config)


def prompts():
    ids = torch.randint(3, V, (3, 5))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def told(*rows):
    """A ``generate`` that goes on with these tokens."""

    def generate(ids, mask):
        return torch.cat([ids, torch.tensor(rows)], 1)

    return generate


def test_the_masks_end_with_the_first_end_token():
    ids, mask = prompts()
    made = rollout(
        llama(), ids, mask, generate=told([5, END, 9, END], [END, 7, -1, 99], [5, 6, 7, 8])
    )
    new = torch.tensor([[5, END, PAD, PAD], [END, PAD, PAD, PAD], [5, 6, 7, 8]])
    counted = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(made["input_ids"], torch.cat([ids, new], 1))
    assert torch.equal(made["attention_mask"], torch.cat([mask, counted], 1))
    assert torch.equal(made["loss_mask"], torch.cat([torch.zeros(3, 5).long(), counted], 1))
    places = [[0, 1, 2, 3, 4, 5, 6, 6, 6], [0, 0, 0, 1, 2, 3, 3, 3, 3], list(range(9))]
    assert made["position_ids"].tolist() == places
    assert list(made) == ["input_ids", "attention_mask", "loss_mask", "position_ids"]


def test_end_and_padding_can_be_said_and_the_length_be_fixed():
    ids, mask = prompts()
    given = told([5, END, 9, 4], [4, 7, 1, 6], [5, 6, 7, 8])
    made = rollout(
        Toy(1), ids, mask, generate=given, eos_token_id=[4, 6], pad_token_id=3, pad_to=11
    )
    assert made["input_ids"][:, 5:].tolist() == [
        [5, END, 9, 4, 3, 3],
        [4, 3, 3, 3, 3, 3],
        [5, 6, 3, 3, 3, 3],
    ]
    assert made["loss_mask"].sum(1).tolist() == [4, 1, 2]
    assert made["attention_mask"].sum(1).tolist() == [9, 4, 7]
    without_end = rollout(Toy(1), ids, generate=given)
    assert without_end["loss_mask"].sum(1).tolist() == [4, 4, 4]
    assert bool((without_end["attention_mask"] == 1).all())
    assert "position_ids" not in {**made, **without_end}  # nothing to count for this model
    assert "position_ids" not in rollout(llama(), ids, generate=given)  # nor without padding


def test_it_writes_what_the_student_writes_in_eval_mode():
    """Greedily, each token is the argmax of a forward pass without a cache over all before it."""
    student = llama(attention_dropout=0.9).train()
    student.model.layers[1].eval()
    before = [m.training for m in student.modules()]
    ids, mask = prompts()
    made = rollout(student, ids, mask, max_new_tokens=6, do_sample=False)
    assert [m.training for m in student.modules()] == before
    student.eval()
    length = made["input_ids"].shape[1]
    for row in range(3):
        text = made["input_ids"][row : row + 1, mask[row].argmax() :]  # without padding
        first = text.shape[1] - (length - ids.shape[1])
        for j in range(first, first + int(made["loss_mask"][row].sum())):
            assert int(student(text[:, :j]).logits[0, -1].argmax()) == int(text[0, j])
    assert not made["input_ids"].is_inference()


def test_positions_do_not_count_the_padding():
    """GPT-2 has absolute positions: the loss is that of each text without its padding."""
    sizes = {"n_embd": 16, "n_head": 2, "n_positions": 24, "eos_token_id": END, "pad_token_id": PAD}
    student, teacher = (
        hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=V, n_layer=n, **sizes, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
            )
        )
        for n in (1, 2)
    )
    nn.init.normal_(student.transformer.wpe.weight)  # far apart, so that a shift is seen
    nn.init.normal_(teacher.transformer.wpe.weight)
    ids, mask = prompts()
    distiller = fxdistill.wrap(student, teacher, logit_loss="reverse_kl", compile=False)
    batch = rollout(distiller, ids, mask, max_new_tokens=5, do_sample=False, pad_to=12)
    loss = distiller(**batch).loss
    parameters = list(student.parameters())
    ours = torch.autograd.grad(loss, parameters)

    total, count = 0.0, 0
    for row in range(3):
        first, new = int(mask[row].argmax()), int(batch["loss_mask"][row].sum())
        text = batch["input_ids"][row : row + 1, first : 5 + new]
        s, t = (m(text).logits[:, -new - 1 : -1].log_softmax(-1) for m in (student, teacher))
        total = total + (s.exp() * (s - t.detach())).sum()
        count += new
    torch.testing.assert_close(loss, total / count)
    for a, b in zip(ours, torch.autograd.grad(total / count, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_random_numbers_come_from_the_generator_and_the_global_state_stays():
    student, (ids, mask) = llama(), prompts()
    options = {"max_new_tokens": 8, "do_sample": True}

    def texts(generator):
        return rollout(student, ids, mask, generator=generator, **options)["input_ids"]

    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = texts(generator), texts(generator)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again = torch.Generator().manual_seed(3)
    assert torch.equal(texts(again), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    rollout(student, ids, mask, **options)
    assert not torch.equal(torch.get_rng_state(), state)  # without a generator, as elsewhere


def test_a_distiller_stands_for_its_student():
    student = llama()
    distiller = fxdistill.wrap(student, llama(3), compile=False)
    ids, mask = prompts()
    options = {"max_new_tokens": 4, "do_sample": False, "num_return_sequences": 1}
    made, other = (rollout(m, ids, mask, **options) for m in (distiller, student))
    assert all(torch.equal(made[name], other[name]) for name in made)
    assert distiller.training
    assert student.training


def test_several_texts_a_prompt():
    ids, mask = prompts()
    options = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    made = rollout(llama(), ids, mask, max_new_tokens=3, **options)
    assert torch.equal(made["input_ids"][:, :5], ids.repeat_interleave(2, 0))
    assert torch.equal(made["attention_mask"][:, :5], mask.repeat_interleave(2, 0))


def test_modes_and_random_state_are_put_back_after_an_error():
    student = llama().train()
    student.lm_head.eval()
    ids, _ = prompts()
    state, before = torch.get_rng_state(), [m.training for m in student.modules()]

    def broken(prompts, mask):
        assert not any(m.training for m in student.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
        raise RuntimeError("the engine is gone")

    with pytest.raises(RuntimeError, match="engine"):
        rollout(student, ids, generate=broken, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in student.modules()] == before


def test_the_training_step_is_compiled_once():
    """Ten lines of an on-policy loop: generation in between, whatever the lengths of texts."""
    student, teacher = llama(1), llama(1)
    distiller = fxdistill.wrap(student, teacher, compile={"backend": "aot_eager"})
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
    generator, graphs, lengths = torch.Generator().manual_seed(0), [], set()
    for step in range(4):
        ids, mask = prompts()
        ids, mask = ids[:, step % 2 :], mask[:, step % 2 :]
        options = {"max_new_tokens": 3 + step, "do_sample": True}
        batch = rollout(distiller, ids, mask, generator=generator, pad_to=12, **options)
        loss = distiller(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths.add(int(batch["attention_mask"].sum()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert loss > 0
    assert len(lengths) > 1
    assert graphs == [graphs[0]] * 4


def test_only_generated_tokens_teach():
    """The loss is the mean divergence of the predictions of generated tokens, up to the end."""
    student, teacher = llama(), llama(3)
    for model in (student, teacher):
        nn.init.normal_(model.lm_head.weight)
    distiller = fxdistill.wrap(student, teacher, compile=False)
    ids, mask = prompts()
    new = [5, END, 9, 9], [7, 8, 9, 3], [END, 3, 3, 3]
    batch = rollout(student, ids, mask, generate=told(*new), pad_to=10)
    found = distiller(**batch).loss
    values = []
    for row, count in enumerate((2, 4, 1)):
        kept = slice(int(mask[row].argmax()), 5 + count)
        text = batch["input_ids"][row : row + 1, kept]
        s, t = (m.eval()(text).logits[0].log_softmax(-1) for m in (student, teacher))
        values += list((t.exp() * (t - s)).sum(-1)[-1 - count : -1])
    assert len(values) == 7
    torch.testing.assert_close(found, torch.stack(values).mean(), rtol=1e-5, atol=1e-6)


IDS, MASK = torch.full((2, 4), 5), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
RIGHT, HOLE = MASK.flip(1), torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("ids", "mask", "text"),
    [
        (IDS.float(), None, "token ids"),
        (IDS[0], None, r"\[B, P\]"),
        (IDS[:, :0], None, "nothing to go on after"),
        (IDS, MASK[:, :3], r"attention_mask is \[2, 3\]"),
        (IDS, RIGHT, "padded on the right"),
        (IDS, HOLE, "zeros between ones"),
        (IDS, MASK * torch.tensor([[0], [1]]), "a row of zeros"),
    ],
)
def test_wrong_prompts(ids, mask, text):
    with pytest.raises(BatchError, match=text):
        rollout(llama(), ids, mask, max_new_tokens=2)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda ids, mask: ids, r"returned \[2, 4\] for prompts \[2, 4\]"),
        (lambda ids, mask: torch.cat([ids, ids])[:1], r"returned \[1, 4\]"),
        (lambda ids, mask: [ids], "returned <class 'list'>"),
        (lambda ids, mask: torch.cat([ids + 1, ids], 1), "does not begin with the prompts"),
        (lambda ids, mask: torch.cat([ids, ids * V], 1), "token ids from 5 to 160"),
        (lambda ids, mask: torch.cat([ids, ids - 9], 1), "token ids from -4"),
    ],
)
def test_what_generate_returns_is_checked(made, text):
    with pytest.raises(ShapeError, match=text):
        rollout(llama(), IDS, generate=made)


@pytest.mark.parametrize(
    ("student", "options", "text"),
    [
        (Toy(1), {}, r"\(Toy\) cannot generate"),
        (nn.DataParallel(llama()), {}, "Pass the model inside"),
        (llama(), {"max_new_tokens": 21}, "need 25 places, and the student has 24"),
        (llama(), {"max_length": 30}, "need 30 places"),
        (llama(), {"max_new_tokens": 4, "pad_to": 7}, "pad_to=7, and prompts of 4"),
        (llama(), {"generate": told([1], [1]), "top_p": 0.9}, "top_p would be lost"),
        (llama(), {"generate": told([1] * 21, [1] * 21)}, "need 25 places"),
        (llama(), {"generate": told([1] * 3, [1] * 3), "pad_to": 6}, "the texts have 7"),
    ],
)
def test_what_cannot_be(student, options, text):
    with pytest.raises(OptionError, match=text):
        rollout(student, IDS, **options)


def test_encoders_and_encoder_decoders_are_no_students_of_this_kind():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = hf.BertForMaskedLM(hf.BertConfig(vocab_size=V, intermediate_size=16, **sizes))
    with pytest.raises(OptionError, match="BertForMaskedLM"):
        rollout(bert, IDS)
    t5 = hf.T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(OptionError, match="encoder-decoder"):
        rollout(hf.T5ForConditionalGeneration(t5), IDS)
