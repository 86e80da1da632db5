"""The cells that say what fast settings cost: their order, their runs, their page."""

from dataclasses import replace

import pytest

from benchmarks.accuracy import execute
from benchmarks.accuracy.cell_loop import run_cells
from benchmarks.accuracy.fast_cells import FULL, GROUPS, SETTINGS, FastCell, FastTuning, compared, slots_of
from benchmarks.accuracy.fast_execute import FastEstimate, FastExecutor
from benchmarks.accuracy.fast_page import write_page
from benchmarks.accuracy.paper_cells import CellFolder
from lofit_fast.config import Recipe
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import word_tokenizer

SIZES = {"mquake": (134, 95), "clutrr": (300, 200)}


def made_up(cell):
    hits = [float((i + cell.seed) % 3 == 0 or (cell.setting == FULL and i % 5 == 0)) for i in range(cell.n_validation)]
    metrics = {"exact_match": sum(hits) / len(hits)}
    environment = {"device": "CPU, 1 threads", "dtype": "float32"}
    tokens = {"select": 100, "tune": 200}
    return {"metrics": metrics, "hits": hits, "heads": [[0, 1]], "tokens": tokens, "environment": environment}


def test_what_matters_most_comes_first():
    assert {name for group in GROUPS for name in group} == set(SETTINGS)
    cells = [slot.cells[0] for slot in slots_of(("smollm2",), SIZES)]
    assert len(set(cells)) == len(cells)
    assert {cell.setting for cell in cells[:21]} <= set(GROUPS[0])
    assert cells[0].setting == FULL
    # nearly all examples are no number of their own
    assert not any(cell.setting == "saliency-128" for cell in cells if cell.task == "mquake")
    assert sum(cell.setting == "saliency-128" for cell in cells) == 3


def test_a_setting_differs_from_the_full_run_by_what_it_says():
    cell = FastCell("smollm2", "mquake", FULL, 43, 10, 5)
    full = cell.recipe()
    assert (full.seed, full.select, full.top, full.tune_lr) == (43, "lofit", 0.1, 2e-2)
    for name, setting in SETTINGS.items():
        if setting.exists:
            assert replace(cell, setting=name).recipe() == replace(full, **setting.recipe)
    assert FastEstimate().seconds(cell) > FastEstimate().seconds(replace(cell, setting="saliency-all")) > 0


def test_the_answers_setting_is_tuned_on_what_is_set_aside(tmp_path, monkeypatch):
    tried = replace(SETTINGS[FULL], tries=({}, {"tune_lr": 4e-2}))
    monkeypatch.setitem(SETTINGS, "answer", tried)
    tuning = FastTuning(CellFolder(tmp_path))
    cell = FastCell("smollm2", "mquake", "answer", 43, 100, 5)
    first, second = tuning.runs(cell)
    assert (first.train_size, first.n_validation, first.seed, first.split) == (75, 25, 42, "tuning")
    assert tuning.settled(cell) is None
    for run, accuracy in ((first, 0.1), (second, 0.2)):
        tuning.folder.write(run, {"metrics": {"exact_match": accuracy}})
    assert tuning.settled(cell).recipe().tune_lr == 4e-2
    assert tuning.settled(replace(cell, setting=FULL)) == replace(cell, setting=FULL)


@pytest.mark.slow
def test_cells_run_as_a_user_would_and_share_step_1(tmp_path, monkeypatch):
    monkeypatch.setattr(
        execute, "load_model", lambda *_, **__: (tiny_model("llama", max_position_embeddings=512), word_tokenizer())
    )
    monkeypatch.setattr(FastCell, "recipe", quick)
    run = FastExecutor(None, tmp_path)
    cell = FastCell("tiny", "kinship", FULL, 42, 12, 4)
    results = {name: run(replace(cell, setting=name)) for name in (FULL, "saliency-all", "random")}
    for name, result in results.items():
        assert len(result["hits"]) == 4
        assert len(result["heads"]) == 2
        assert result["tokens"]["tune"] > 0
        assert result["settings"]["select"] == SETTINGS[name].recipe.get("select", "lofit")
    tokens = {name: result["tokens"]["select"] for name, result in results.items()}
    assert tokens[FULL] == 2 * tokens["saliency-all"] > tokens["random"] == 0
    assert len(list((tmp_path / "step1").iterdir())) == 3


def quick(cell):
    return Recipe(top=2, select_epochs=2, tune_epochs=1, seed=cell.seed, **SETTINGS[cell.setting].recipe)


def test_the_page_compares_in_pairs(tmp_path):
    slots = slots_of(("smollm2",), SIZES, seeds=(42, 43), settings=(FULL, "saliency-64"))
    folder, tuning = CellFolder(tmp_path / "fast" / "cells"), FastTuning(CellFolder(tmp_path / "fast" / "cells"))
    summary = {"summary": tmp_path / "summary.json", "progress": False}
    done = run_cells(slots, folder, tuning, made_up, estimate=FastEstimate(), **summary)
    assert done["failed"] == []
    page = write_page(tmp_path / "fast.md", folder, slots, "the command").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| saliency, 64 examples |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "42, 43"
    low, high = (float(end) for end in cells[4].split(" to "))
    assert low < float(cells[3]) < high < 0
    assert cells[5:] == ["1.00", "100", "300"]
    assert "the command" in page
    assert "`fast/cells/`" in page
    assert page.count("## ") == 2
    # a page of nothing, and of part
    assert (
        "No cell is finished" in write_page(tmp_path / "none.md", CellFolder(tmp_path / "no"), slots, "c").read_text()
    )
    assert len(list(compared(folder, slots))) == len(slots)
