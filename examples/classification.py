"""Sequence classification: LoFiT in the decoder, and the new head beside it trained too."""

from pathlib import Path

import typer
from safetensors.torch import save_model
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, Trainer, TrainingArguments

import lofit_fast as lf
from examples.material import ModelName, Output, Steps, losses_of, model_and_stories, tell
from lofit_fast.tasks.kinship import RELATIONS


def classifier_of(model, tokenizer) -> LlamaForSequenceClassification:
    """A classifier of stories on a language model's decoder, with a head that has learned nothing."""
    config = model.config
    config.num_labels, config.pad_token_id = len(RELATIONS), tokenizer.pad_token_id or tokenizer.eos_token_id
    classifier = LlamaForSequenceClassification(config)
    classifier.model = model.model
    return classifier


def train_classifier(model, tokenizer, stories, steps: int, output: Path) -> list[float]:
    """Train offsets and head. Returns the losses; both are in output, as adapter and head.safetensors."""
    rows = [{**tokenizer(story.prompt), "labels": list(RELATIONS).index(story.completion.strip())} for story in stories]
    model = classifier_of(model, tokenizer)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    # patching froze it with all the rest
    model.score.requires_grad_(True)
    args = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=max(1, steps // 2),
        logging_steps=1,
        report_to="none",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        # checkpoints keep the head, which is trained, and the vectors, but not the frozen decoder
        callbacks=[lf.AdapterCheckpoints(handle, save_base=False)],
    )
    trainer.train()
    handle.save(output / "adapter")
    save_model(model.score, str(output / "head.safetensors"))
    return losses_of(trainer)


def main(model: ModelName = "tiny", steps: Steps = 20, output: Output = Path("runs/classification")) -> None:
    """Train a classifier of family relations."""
    tell(train_classifier(*model_and_stories(model), steps, output))


if __name__ == "__main__":
    typer.run(main)
