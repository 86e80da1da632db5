"""How few examples saliency needs: what is compared, and that rows that are there are kept."""

import json

import pytest
import torch

from benchmarks.accuracy import saliency_examples as module
from benchmarks.accuracy.fast_page import write_page
from benchmarks.accuracy.paper_cells import CellFolder
from tests.markdown_tables import cells_of
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import word_tokenizer


def row(examples, seed, scores):
    return {"model": "tiny", "task": "kinship", "seed": seed, "examples": examples, "top": 2, "scores": [scores]} | {
        "environment": {"device": "CPU, 1 threads", "dtype": "float32"},
    }


ROWS = [
    # the same two heads, one of them, and the best two of all
    row(32, 42, [1.0, 2.0, 0.0, 0.0]),
    row(32, 43, [0.0, 3.0, 2.0, 1.0]),
    row(64, 42, [3.0, 4.0, 2.0, 0.0]),
    row(64, 43, [2.0, 4.0, 3.0, 0.0]),
]


def test_the_table_compares_with_all_examples_of_the_draw():
    _, few, whole = cells_of(module.examples_table(ROWS))
    # each 32 chose as its own 64 did; the two draws share one head of three
    assert few == ["kinship, tiny", "2", "32", "1.00", "100.0 %", "0.33"]
    assert whole == ["kinship, tiny", "2", "64", "1.00", "100.0 %", "0.33"]
    off = [row(32, 42, [0.0, 2.0, 0.0, 1.0]), *ROWS[1:]]
    # heads 1 and 3 have 4 of the 7 that 0 and 1 have
    assert cells_of(module.examples_table(off))[1][3:5] == ["0.67", f"{100 * (4 / 7 + 1) / 2:.1f} %"]


@pytest.mark.parametrize(("size", "counts"), [(300, [64, 128, 300]), (96, [64, 96]), (20, [20])])
def test_numbers_of_examples_end_with_all(size, counts):
    assert module.counts_of(size) == counts


def test_the_page_has_the_section_where_it_was_measured(tmp_path):
    folder = CellFolder(tmp_path / "fast" / "cells")
    assert "How few" not in write_page(tmp_path / "fast.md", folder, [], "c").read_text()
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "saliency_examples.json").write_text(json.dumps({"rows": ROWS}))
    page = write_page(tmp_path / "fast.md", folder, [], "c").read_text()
    assert "| kinship, tiny | 2 | 32 | 1.00 |" in page and "CPU, 1 threads, float32" in page


def test_each_number_is_looked_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ALL", 8)
    monkeypatch.setattr(module, "COUNTS", (4,))
    monkeypatch.setattr(
        module, "load_model", lambda *_, **__: (tiny_model("llama", max_position_embeddings=512), word_tokenizer())
    )
    asked = {"model": "tiny", "task": "kinship", "dtype": "float32", "output": tmp_path / "rows.json"}
    module.saliency_examples(None, **asked)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(r["seed"], r["examples"]) for r in rows] == [(42, 4), (42, 8), (43, 4), (43, 8)]
    assert len({str(r["scores"]) for r in rows}) == 4
    assert all(torch.tensor(r["scores"]).isfinite().all() for r in rows)
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows[1:]}))
    module.saliency_examples(None, **asked)
    again = json.loads((tmp_path / "rows.json").read_text())["rows"]
    # the same scores to the last digit, and the others untouched
    assert again == [*rows[1:], rows[0]]
