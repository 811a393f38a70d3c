"""A distiller under transformers.Trainer: every term logged, the best student chosen and saved."""

from collections.abc import Sequence

from code_pair import options, pair, rows
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from fxdistill.trainers import LossCallback, SaveStudent


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(__doc__, argv)
    half = max(1, asked.steps // 2)
    folder = asked.out / "trainer"
    arguments = TrainingArguments(
        str(folder),
        max_steps=asked.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        logging_steps=max(1, asked.steps // 10),
        eval_strategy="steps",
        eval_steps=half,
        save_steps=half,
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = rows(asked.out, 8 * asked.steps + 16)
    trainer = Trainer(
        model=pair(),
        args=arguments,
        train_dataset=data[16:],
        eval_dataset=data[:16],
        callbacks=[LossCallback(), SaveStudent()],
    )
    trainer.train()
    print("held out:", trainer.evaluate()["eval_loss"])
    best = trainer.state.best_model_checkpoint
    student = LlamaForCausalLM.from_pretrained(f"{best}/student")
    print(f"{best}/student loads: {student.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
