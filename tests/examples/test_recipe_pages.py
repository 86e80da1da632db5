"""The code of docs/recipes.md stands in scripts that run; that of docs/coming_from.md runs here."""

import ast
import re
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lofit_fast.data.encode import encode
from lofit_fast.training import CompletionCollator
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def sections(page):
    """{title: text} of a page's second-level sections."""
    parts = re.split(r"^## (.+)\n", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


RECIPES, COMING = sections("recipes.md"), sections("coming_from.md")


def flat(code):
    """The lines of a code without their indentation."""
    return "\n".join(line.strip() for line in code.strip().splitlines())


@pytest.mark.parametrize("title", [title for title in RECIPES if "examples/" in RECIPES[title]])
def test_a_recipe_stands_in_its_script(title):
    (script,) = re.findall(r"\]\(\.\./(examples/\w+\.py)\)", RECIPES[title])
    blocks = [code for _, code in BLOCK.findall(RECIPES[title])]
    assert blocks
    source = flat((ROOT / script).read_text())
    assert [code for code in blocks if flat(code) not in source] == []


def test_every_script_has_a_recipe():
    named = set(re.findall(r"examples/(\w+)\.py", (ROOT / "docs" / "recipes.md").read_text()))
    # material and peft_inputs are what the scripts share; make demo shows the demo
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "demo", "material", "peft_inputs"}
    assert len(scripts) > 8 and scripts == named


EXECUTED = [(title, number) for title in COMING for number in (0, 1) if number or title in ("PEFT", "TRL")]


@pytest.mark.parametrize("title, number", EXECUTED, ids=lambda value: str(value))
def test_the_lines_of_both_run(title, number, tmp_path):
    if title in ("PEFT", "TRL"):
        pytest.importorskip(title.lower())
    tokenizer = tiny_tokenizer()
    examples = [{"prompt": f"{n}: ", "completion": "abc"[n % 3]} for n in range(8)]
    rows, collate = [encode(tokenizer, row, None) for row in examples], CompletionCollator(0)
    names = {
        "model": tiny_model("llama"),
        "fresh_model": lambda: tiny_model("llama"),
        "tokenizer": tokenizer,
        "examples": examples,
        "dataset": pytest.importorskip("datasets").Dataset.from_list(examples) if title == "TRL" else None,
        "rows": rows,
        "batch": {"input_ids": tokens()},
        "collate": collate,
        "encode": encode,
        "folder": tmp_path if title == "The original code" else str(tmp_path / "adapter"),
        "top": 3,
        "Trainer": Trainer,
        "args": TrainingArguments(
            str(tmp_path / "run"), max_steps=2, remove_unused_columns=False, report_to="none", use_cpu=True
        ),
    }
    _, code = BLOCK.findall(COMING[title])[number]
    exec(compile(code, f"coming_from.md, {title}", "exec"), names)
    # what is there at the end computes what was trained, not the base
    ends = names["model"] if title == "PEFT" else names["handle"].model if number else names["trainer"].model
    with torch.no_grad():
        assert torch.isfinite(ends(tokens()).logits).all()
        assert not torch.equal(ends(tokens()).logits, tiny_model("llama")(tokens()).logits)


def test_what_is_not_executed_says_so_and_is_python():
    for title in COMING.keys() - {"PEFT", "TRL"}:
        assert "Not executed" in COMING[title], title
        language, code = BLOCK.findall(COMING[title])[0]
        if language == "python":
            ast.parse(textwrap.dedent(code))
