"""On-policy distillation by TRL: its data, generation and logging around the step of a distiller.

Half of the batches are what the student writes after the first words of a line of code, half are
the lines themselves.
"""

from collections.abc import Sequence

import trl
from code_pair import VOCABULARY, options, pair
from datasets import Dataset
from stdlib_text import END_OF_FILE, source_files
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

import fxdistill
from fxdistill.trainers.trl import DistillationTrainer


def lines(count: int) -> list[str]:
    """Lines of the standard library that have a few words."""
    texts = (path.read_text("utf-8", errors="replace") for path in source_files())
    found = (line.strip() for text in texts for line in text.splitlines())
    long = (line for line in found if len(line.split()) > 4)
    return [line for line, _ in zip(long, range(count), strict=False)]


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    special = [END_OF_FILE]
    bpe.train_from_iterator(texts, VOCABULARY, special_tokens=special, show_progress=False)
    given = {"eos_token": END_OF_FILE, "pad_token": END_OF_FILE, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **given)


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(__doc__, argv)
    texts = lines(16 * asked.steps + 1000)
    words = [text.split() for text in texts]
    data = Dataset.from_dict(
        {
            "prompt": [" ".join(line[:2]) for line in words],
            "completion": [" " + " ".join(line[2:]) for line in words],
        }
    )
    distiller = pair(logit_loss="reverse_kl", feature_weight=0.1)
    schedule = fxdistill.Schedule(
        distiller, temperature=fxdistill.schedules.linear(2, 1, steps=asked.steps)
    )
    arguments = trl.DistillationConfig(
        str(asked.out / "trl"),
        max_steps=asked.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        max_completion_length=24,
        logging_steps=max(1, asked.steps // 10),
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    tokenizer = tokenizer_of(texts)
    given = {"train_dataset": data, "processing_class": tokenizer, "schedule": schedule}
    trainer = DistillationTrainer(distiller, args=arguments, on_policy=0.5, **given)
    trainer.train()
    distiller.save_pretrained(asked.out / "student")
    tokenizer.save_pretrained(asked.out / "student")


if __name__ == "__main__":
    main()
