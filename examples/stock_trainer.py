"""transformers.Trainer as it comes: it resumes where it stopped, and ends with the best vectors."""

from pathlib import Path

import typer
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lofit_fast as lf
from examples.material import ModelName, Output, Steps, losses_of, model_and_stories, tell
from lofit_fast.data.encode import encode, pad_token_id
from lofit_fast.training import CompletionCollator


def train_stock(model, tokenizer, stories, steps: int, output: Path) -> list[float]:
    """Train offsets on every head; called again with more steps, go on. Returns the losses of all steps so far."""
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    rows = [encode(tokenizer, story, None) for story in stories]
    half = max(1, steps // 2)
    args = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        # CompletionCollator names the rows of logits itself, so nothing may be dropped, and no logits collected
        remove_unused_columns=False,
        prediction_loss_only=True,
        eval_strategy="steps",
        eval_steps=half,
        save_steps=half,
        load_best_model_at_end=True,
        logging_steps=1,
        report_to="none",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=rows[8:],
        eval_dataset=rows[:8],
        data_collator=CompletionCollator(pad_token_id(tokenizer)),
        callbacks=[lf.AdapterCheckpoints(handle, save_base=False)],
    )
    output.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output))
    handle.save(output / "adapter")
    return losses_of(trainer)


def main(model: ModelName = "tiny", steps: Steps = 20, output: Output = Path("runs/trainer")) -> None:
    """Train with transformers.Trainer; run it again with more steps to go on."""
    tell(train_stock(*model_and_stories(model), steps, output))


if __name__ == "__main__":
    typer.run(main)
