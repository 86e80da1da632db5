"""What the examples train: a model (tiny and random, or a real one), family stories, and how a run is told."""

from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from lofit_fast.models.load import load_model
from lofit_fast.tasks.kinship import RELATIONS, kinship
from lofit_fast.tasks.task import Example

ModelName = Annotated[str, typer.Option("--model", "-m", help="tiny, smollm2, or as for `lofit-fast train`.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the adapter goes.")]


def model_and_stories(name: str, count: int = 64):
    """(model, tokenizer, stories). name: "tiny" for a random Llama of two layers that knows the stories' words."""
    stories = kinship(count, len(RELATIONS), 0).train
    if name != "tiny":
        logging.set_verbosity_error()
        return *load_model(name, dtype="float32", device="cpu"), stories
    torch.manual_seed(0)
    tokenizer = _word_tokenizer(stories)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer, stories


def other_relation(relation: str) -> str:
    """A wrong answer to a story whose right one is given, the same every time."""
    names = list(RELATIONS)
    return " " + names[(names.index(relation.strip()) + 1) % len(names)]


def tell(losses: list[float]) -> list[float]:
    """Print the first and the last losses, means over a quarter of the steps. Returns the losses."""
    quarter = max(1, len(losses) // 4)
    print(f"loss: {mean(losses[:quarter]):.3f} at first, {mean(losses[-quarter:]):.3f} after {len(losses)} steps")
    return losses


def losses_of(trainer) -> list[float]:
    """Every step's loss of a trainer of transformers with logging_steps=1."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _word_tokenizer(stories: list[Example]) -> PreTrainedTokenizerFast:
    words = sorted({word for story in stories for word in (story.prompt + story.completion).split()} | {*RELATIONS})
    vocabulary = {token: number for number, token in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
