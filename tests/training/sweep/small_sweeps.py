"""Sweeps of short runs on a tiny model."""

import json

from lofit_fast.training.sweep.grid import parse_grid
from lofit_fast.training.sweep.run import sweep
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

BASE = {"model": "tiny", "top": 2, "select_epochs": 1, "tune_epochs": 1, "batch_size": 4}


def written_data(folder):
    """The path of ten examples, which are written into the folder."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}=", "completion": a * 2}) + "\n" for a in "abcdefghij"))
    return str(path)


def written_base(folder):
    """The path of a tiny Llama and its tokenizer, which are saved in the folder."""
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def grid_of(data, base=None, **grid):
    return parse_grid({"base": {**BASE, "data": data, **(base or {})}, "grid": grid})


def run(grid, folder, model=None, **options):
    base = (model or tiny_model("llama"), tiny_tokenizer())
    return sweep(grid, folder, base=base, progress=False, **options)
