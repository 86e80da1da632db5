"""Packages that only a part of the library needs: where one is missing, the error names it and the extra."""

import importlib
import sys

import pytest
import torch

import lofit_fast as lf
from lofit_fast import extras
from lofit_fast.config import Recipe
from lofit_fast.plots import heads_map
from lofit_fast.tasks.open_domain import hub_rows
from lofit_fast.training.summary import write_summary
from lofit_fast.training.sweep.sweep_tables import as_table
from lofit_fast.training.two_steps import FitResult
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

EXAMPLES = [{"prompt": f"{letter}=", "completion": letter} for letter in "abcd"]


def missing(monkeypatch, *packages):
    """As on a machine where these are not installed."""
    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in packages else find(name))
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    for name in packages:
        # an import of it raises ModuleNotFoundError then
        monkeypatch.setitem(sys.modules, name, None)


def test_fit_without_accelerate_changes_nothing(monkeypatch, tmp_path, llama):
    missing(monkeypatch, "accelerate")
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    with pytest.raises(ImportError, match=r'training needs accelerate: pip install "lofit-fast\[train\]"'):
        lf.fit(llama, tiny_tokenizer(), EXAMPLES, Recipe(top=2), output_dir=tmp_path / "run")
    assert lf.handle_of(llama) is None and not (tmp_path / "run").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_a_finished_run_does_not_fail_for_its_pictures(monkeypatch, tmp_path):
    missing(monkeypatch, "matplotlib")
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 1)]))
    history = [{"stage": "tune", "epoch": 1, "loss": 1.0}]
    result = FitResult(handle, [(0, 1)], torch.rand(3, 4), history, {"tune": {"seconds": 1.0}})
    with pytest.warns(UserWarning, match=r'no pictures: matplotlib .*: pip install "lofit-fast\[train\]"'):
        write_summary(tmp_path, result, model="tiny", task="none", recipe=Recipe(), data_seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


READERS = {
    "matplotlib, train": lambda folder: heads_map(torch.rand(3, 4), [(0, 0)], folder / "heads.png"),
    "rich, train": lambda folder: as_table([{"name": "a"}], "runs"),
    "peft, peft": lambda folder: importlib.import_module("lofit_fast.peft"),
}


@pytest.mark.parametrize("needed", READERS)
def test_what_is_missing_is_named(needed, monkeypatch, tmp_path):
    package, extra = needed.split(", ")
    missing(monkeypatch, package)
    for name in [name for name in sys.modules if name.split(".")[:2] == ["lofit_fast", "peft"]]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "lofit-fast\[{extra}\]" \(.*{package}'):
        READERS[needed](tmp_path)


def test_questions_from_the_hub_need_data_sets(monkeypatch):
    missing(monkeypatch, "datasets")
    with pytest.raises(ImportError, match=r'nq_open from the hub needs datasets: pip install "lofit-fast\[train\]"'):
        hub_rows("nq_open")
