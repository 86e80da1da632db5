"""The folder `lofit_fast/cpu` can be deleted: the library imports, patches, trains and judges without it."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CODE = """
import importlib.util
import sys

# an editable installation finds the folder in the checkout, wherever its package was found
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert importlib.util.find_spec("lofit_fast.cpu") is None

import torch

import lofit_fast as lf
from lofit_fast.data.pack import GROUPED
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.training.engine.cpu_extras import HAS_CPU_EXTRAS
from tests.oracle import Hook, randomize, vectors_of
from tests.tiny_models import tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer

assert lf.__file__.startswith(FOLDER) and not HAS_CPU_EXTRAS
model, ids = tiny_model("llama"), tokens()
handle = lf.patch(model, lf.LofitConfig(scale="all", offset="all"))
randomize(handle)
patched, vectors = model(ids).logits, vectors_of(handle)
handle.unpatch()
hook = Hook(model, vectors)
assert (model(ids).logits - patched).abs().max() < 1e-5 * patched.abs().max()
hook.remove()

examples = [{"prompt": f"{a}=", "completion": a * 2} for a in "abcdef"]
recipe = lf.Recipe(top=2, select_epochs=1, tune_epochs=1)
result = lf.fit(model, tiny_tokenizer(), examples, recipe, output_dir=FOLDER + "/run", eval_data=examples[:2])
assert len(result.heads) == 2
assert len(generate_answers(model, tiny_tokenizer(), ["a="], max_new_tokens=2)) == 1
result.handle.unpatch()
try:
    engine = lf.Engine(attention=GROUPED)
    lf.fit(model, tiny_tokenizer(), examples, recipe, output_dir=FOLDER + "/other", engine=engine)
except ValueError as error:
    print("refused:", error)
"""


def imported(path: Path) -> set[str]:
    """Names of modules that a file imports, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    return found


def test_one_file_alone_knows_the_folder():
    outside = [path for path in (ROOT / "lofit_fast").rglob("*.py") if path.parent.name != "cpu"]
    users = [path.name for path in outside if any(name.startswith("lofit_fast.cpu") for name in imported(path))]
    assert users == ["cpu_extras.py"]


@pytest.mark.slow
def test_everything_works_without_the_cpu_folder(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "cpu")
    shutil.copytree(ROOT / "lofit_fast", tmp_path / "lofit_fast", ignore=ignored)
    paths = (tmp_path, ROOT / "kernels", ROOT)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", f"FOLDER = {str(tmp_path)!r}\n" + CODE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    # what the folder alone can do is refused by name
    assert "refused: attention 'lofit_grouped' cannot be used here" in done.stdout
