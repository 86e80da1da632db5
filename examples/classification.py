"""Sequence classification: LoFiT in an encoder or a decoder, and the new head on it trained too."""

from pathlib import Path

import torch
import typer
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import lofit_fast as lf
from examples.material import ModelName, Output, Steps, losses_of, model_and_stories, tell
from lofit_fast.models.load import resolve
from lofit_fast.tasks.kinship import RELATIONS, kinship


def classifier_and_stories(name: str):
    """(classifier, tokenizer, stories). name: "tiny" for a random ModernBERT, or any encoder or decoder."""
    if name == "tiny":
        _, tokenizer, stories = model_and_stories(name)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        config = ModernBertConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=len(RELATIONS), **sizes, **ids)
        return ModernBertForSequenceClassification(config), tokenizer, stories
    folder = resolve(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(RELATIONS), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    return classifier, tokenizer, kinship(64, len(RELATIONS), 0).train


def head_of(model) -> dict[str, nn.Parameter]:
    """The parameters of a classifier that are not in its encoder or decoder, by name."""
    return {name: p for name, p in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}


def train_classifier(model, tokenizer, stories, steps: int, output: Path) -> list[float]:
    """Train offsets and head. Returns the losses; both are in output, as adapter and head.safetensors."""
    rows = [{**tokenizer(story.prompt), "labels": list(RELATIONS).index(story.completion.strip())} for story in stories]
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    # patching froze it with all the rest
    for parameter in head_of(model).values():
        parameter.requires_grad_(True)
    args = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        save_steps=max(1, steps // 2),
        logging_steps=1,
        report_to="none",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        # checkpoints keep the head, which is trained, and the vectors, but not the frozen base
        callbacks=[lf.AdapterCheckpoints(handle, save_base=False)],
    )
    trainer.train()
    handle.save(output / "adapter")
    save_file(head_of(model), output / "head.safetensors")
    return losses_of(trainer)


def main(model: ModelName = "tiny", steps: Steps = 20, output: Output = Path("runs/classification")) -> None:
    """Train a classifier of family relations."""
    tell(train_classifier(*classifier_and_stories(model), steps, output))


if __name__ == "__main__":
    typer.run(main)
