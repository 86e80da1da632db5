"""Supervised fine-tuning with TRL's SFTTrainer: the adapter rides along in its checkpoints."""

from pathlib import Path

import typer
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import lofit_fast as lf
from examples.material import ModelName, Output, Steps, losses_of, model_and_stories, tell


def train_sft(model, tokenizer, stories, steps: int, output: Path) -> list[float]:
    """Train offsets on every head. Returns the losses; the adapter is in output/adapter."""
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    dataset = Dataset.from_list([{"prompt": story.prompt, "completion": story.completion} for story in stories])
    args = SFTConfig(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        # the backward pass ends at the lowest tuned layer as long as nobody asks for the embeddings' gradients
        activation_checkpointing=False,
        completion_only_loss=True,
        save_steps=max(1, steps // 2),
        logging_steps=1,
        bf16=False,
        report_to="none",
    )
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[lf.AdapterCheckpoints(handle)],
    )
    trainer.train()
    handle.save(output / "adapter")
    return losses_of(trainer)


def main(model: ModelName = "tiny", steps: Steps = 20, output: Output = Path("runs/sft")) -> None:
    """Train with TRL's SFTTrainer."""
    tell(train_sft(*model_and_stories(model), steps, output))


if __name__ == "__main__":
    typer.run(main)
