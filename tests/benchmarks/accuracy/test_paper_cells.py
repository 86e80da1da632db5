"""Cells: names, files, what is and is not the same cell."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy.cell_settings import agree, settings_today
from benchmarks.accuracy.method_table import METHODS, grid
from benchmarks.accuracy.paper_cells import Cell, CellFolder, as_options, cell_of, main_metric
from benchmarks.peers.table import COMPARED

CELL = Cell("smollm2", "clutrr", "lofit", 42, 64, 48, 3, "lofit", options=as_options({"top": 0.1, "l1": 1e-3}))
RESULT = {"metrics": {"exact_match": 0.5}, "hits": [1.0, 0.0] * 200}


def test_a_cell_survives_its_file(tmp_path):
    folder = CellFolder(tmp_path / "cells")
    assert folder.result(CELL) is None
    folder.write(CELL, RESULT)
    (path,) = (tmp_path / "cells").iterdir()
    content = json.loads(path.read_text())
    assert cell_of(content["cell"]) == CELL
    assert content["hits"] == RESULT["hits"]
    # hits share a line
    assert len(path.read_text().splitlines()) < 40
    assert CellFolder(tmp_path / "cells").result(CELL) == content == folder.result(CELL)


def test_a_cell_whose_settings_changed_is_made_anew(tmp_path):
    lora = replace(CELL, method="lora", selector="", options=())
    two = replace(CELL, method="lofit_on_lora", options=as_options({"top": 0.1, "lr": 3e-3}))
    for cell in (CELL, lora, two, replace(CELL, method="lofit_scaled"), replace(lora, method="iti")):
        now = json.loads(json.dumps(settings_today(cell)))
        folder = CellFolder(tmp_path, lambda cell, content: agree(settings_today(cell), content["settings"]))
        folder.write(cell, {**RESULT, "settings": now})
        assert folder.result(cell)
        of_one = now.get("lora", now)
        for key, value in of_one.items():
            changed = {**of_one, key: "another"}
            written = {**now, "lora": changed} if "lora" in now else changed
            assert not agree(settings_today(cell), written), (cell.method, key, value)
            # older files say fewer
            fewer = {name: one for name, one in of_one.items() if name != key}
            assert agree(settings_today(cell), {**now, "lora": fewer} if "lora" in now else fewer)
        CellFolder(tmp_path).write(cell, {**RESULT, "settings": written})
        again = CellFolder(tmp_path, folder._current)
        assert again.result(cell) is None
        again.write(cell, {**RESULT, "settings": now})
        assert again.result(cell)["settings"] == now


def test_the_committed_cells_are_of_todays_settings():
    """But for those of heads of another task, whose step 1 was another."""
    for path in Path("docs/results/paper/cells").glob("*.json"):
        content = json.loads(path.read_text())
        cell = cell_of(content["cell"])
        assert cell.heads_from or agree(settings_today(cell), content["settings"]), path.name


def test_the_name_says_what_it_is_and_tells_cells_apart():
    assert CELL.name.startswith("smollm2.clutrr.lofit.lofit.seed42.n64.l1=0.001.top=0.1.")
    changes = {"model": "m", "task": "mquake", "seed": 1, "n_validation": 2, "epochs": 9, "outside": ("mquake",)}
    changes |= {"split": "tuning", "heads_from": "mquake", "heads_size": 7, "options": (), "n_outside": 3}
    others = {replace(CELL, **{key: value}).name for key, value in changes.items()}
    assert len(others | {CELL.name}) == len(changes) + 1


def test_the_order_of_options_does_not_matter():
    assert as_options({"b": [1, 2], "a": 1}) == as_options({"a": 1, "b": (1, 2)}) == (("a", 1), ("b", (1, 2)))
    cell = replace(CELL, options=as_options({"targets": ("q", "v")}))
    assert cell_of(json.loads(json.dumps(cell.spec()))) == cell


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / f"{CELL.name}.json").write_text("{")
    with pytest.raises(ValueError, match="is not whole JSON"):
        CellFolder(tmp_path).result(CELL)


def test_other_keys_are_no_cell():
    with pytest.raises(ValueError, match="expected a cell of"):
        cell_of({**CELL.spec(), "more": 1})


def test_main_metric():
    assert main_metric({"mc2": 0.1, "mc1": 0.2}) == "mc1"
    assert main_metric({"exact_match": 0.1}) == "exact_match"
    with pytest.raises(ValueError, match="expected one of exact_match, mc1"):
        main_metric({"loss": 1.0})


def test_the_methods_that_are_peers_are_what_the_table_of_peers_says():
    kinds = {name: METHODS[name].kind for name in METHODS if name in COMPARED}
    assert kinds == {name: peer.kind for name, peer in COMPARED.items()}
    assert all(METHODS[name].tuned and grid(name) == peer.tuning for name, peer in COMPARED.items())
