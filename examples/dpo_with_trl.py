"""DPO with TRL: the reference is the same model with its adapter switched off, computed once and beforehand."""

from pathlib import Path

import typer
from datasets import Dataset
from trl import DPOConfig

import lofit_fast as lf
from examples.material import ModelName, Output, Steps, losses_of, model_and_stories, other_relation, tell
from lofit_fast.training.preference_trainer import ReferencedDPOTrainer


def train_dpo(model, tokenizer, stories, steps: int, output: Path) -> list[float]:
    """Train offsets on every head to prefer right answers. Returns the losses; the adapter is in output/adapter."""
    pairs = Dataset.from_list(
        [{"prompt": s.prompt, "chosen": s.completion, "rejected": other_relation(s.completion)} for s in stories]
    )
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    pairs = lf.reference_logprobs(handle, pairs, tokenizer, batch_size=4)
    args = DPOConfig(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        beta=0.5,
        precompute_ref_log_probs=True,
        activation_checkpointing=False,
        save_steps=max(1, steps // 2),
        logging_steps=1,
        bf16=False,
        report_to="none",
    )
    trainer = ReferencedDPOTrainer(
        model,
        args=args,
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=[lf.AdapterCheckpoints(handle)],
    )
    trainer.train()
    handle.save(output / "adapter")
    return losses_of(trainer)


def main(model: ModelName = "tiny", steps: Steps = 20, output: Output = Path("runs/dpo")) -> None:
    """Train with TRL's DPO."""
    tell(train_dpo(*model_and_stories(model), steps, output))


if __name__ == "__main__":
    typer.run(main)
