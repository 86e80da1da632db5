"""`lofit-fast heads`: a table, JSON, and a page that needs nothing else."""

import re

import pytest

import lofit_fast as lf
from tests.cli.calling import as_json, call, error_of


def test_what_the_heads_write(model, run_folder, data):
    found = as_json("heads", "--model", model, "--adapter", run_folder / "adapter", "--data", data, "--tokens", "3")
    assert len(found["heads"]) == 2 and found["overlaps"] == []
    for head in found["heads"]:
        assert len(head["promoted"]) == len(head["suppressed"]) == 3
        assert head["promoted"][0][1] >= head["promoted"][1][1]
    shown = call("heads", "--model", model, "--adapter", run_folder / "adapter", "--prompt", "a=").stdout
    assert "raises" in shown and "lowers" in shown


def test_the_page_holds_all_and_refers_to_nothing(model, run_folder, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    page = tmp_path / "heads.html"
    other = run_folder / "tune" / ".." / "adapter"
    options = ("--prompt", "<b>&a=", "--compare", other, "--output", page)
    found = as_json("heads", "--model", model, "--adapter", run_folder / "adapter", *options)
    assert found["page"] == str(page) and found["overlaps"][0]["jaccard"] == 1.0
    text = page.read_text()
    assert text.count("<img") == 2 and "&lt;b&gt;&amp;a=" in text and "<b>&a" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_scales_beside_the_offsets_are_counted(model, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    base, _ = lf.load_model(str(model), device="cpu")
    handle = lf.patch(base, lf.LofitConfig(scale=[(0, 1), (1, 0), (1, 1)], offset=[(0, 1)]))
    folder, page = handle.save(tmp_path / "both"), tmp_path / "heads.html"
    options = ("--model", model, "--adapter", folder, "--prompt", "a=", "--output", page)
    found = as_json("heads", *options)
    assert (len(found["heads"]), found["heads_scaled"]) == (1, 3)
    assert "3 heads are scaled, too" in page.read_text()
    assert "3 heads are scaled, too" in call("heads", *options).stdout


def test_bad_calls(model, run_folder, tmp_path):
    adapter = run_folder / "adapter"
    base = ("heads", "--model", model, "--adapter", adapter)
    assert "so there is nothing for --task" in error_of(*base, "--prompt", "a", "--task", "kinship")
    assert "is named more than once" in error_of(*base, "--compare", adapter)
    assert "is no adapter folder" in error_of(*base, "--prompt", "a", "--compare", tmp_path)
    assert "--tokens: got 0" in error_of(*base, "--tokens", "0")
