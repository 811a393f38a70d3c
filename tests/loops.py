"""A small pair of language models, rows of text, and transformers' Trainer around them."""

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fxdistill

ROWS, LENGTH = 8, 12
PAIR = {"model.layers.0.mlp": "model.layers.1.mlp"}


def llama(layers, **options):
    torch.manual_seed(layers)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, num_hidden_layers=layers, tie_word_embeddings=True, **sizes, **options
        )
    )


def pair(**options):
    return fxdistill.wrap(
        llama(1), llama(2), PAIR, **{"compile": False, "feature_weight": 5.0} | options
    )


class Rows(Dataset):
    """Rows of text with a column that no model takes, some of them padded."""

    def __init__(self, padded=True):
        self.padded = padded

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        ids = (torch.arange(i, i + LENGTH) * 7) % 64
        mask = (torch.arange(LENGTH) < LENGTH - (i % 3 if self.padded else 0)).long()
        labels = ids.masked_fill(mask == 0, -100)
        row = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {**row, "comment": "text that no model takes"}

    def batch(self):
        rows = [self[i] for i in range(ROWS)]
        return {k: torch.stack([row[k] for row in rows]) for k in rows[0] if k != "comment"}


def losses_of(run, optimizer, batches, backward=torch.Tensor.backward):
    """The loss of every step of a plain loop."""
    found = []
    for batch in batches:
        out = run(**batch)
        backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.loss.item())
    return found


def trainer(distiller, folder, padded=True, callbacks=None, of_trainer=None, **arguments):
    given = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    given |= {"per_device_train_batch_size": ROWS, "save_strategy": "no", **arguments}
    args = TrainingArguments(str(folder), **given)
    rows = Rows(padded)
    given = {"train_dataset": rows, "eval_dataset": rows, "callbacks": callbacks}
    return Trainer(model=distiller, args=args, **given, **(of_trainer or {}))
