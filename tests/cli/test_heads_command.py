"""`lofit-fast heads`: a table, JSON, and a page that needs nothing else."""

import json
import re

import pytest
import torch

import lofit_fast as lf
from lofit_fast.selection import heads_page
from lofit_fast.selection.attention_maps import attention_maps
from lofit_fast.tasks import load_task
from lofit_fast.training.run_folder import RunFolder
from lofit_fast.training.run_source import source_of
from tests.cli.calling import as_json, call, error_of
from tests.oracle import randomize


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


def test_the_prompt_is_one_that_the_run_has_held_out(model, tmp_path, monkeypatch):
    rows = [{"prompt": f"{n}=", "completion": "x"} for n in range(20)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seed = next(n for n in range(50) if first_held_out(path, n) != first_held_out(path, 42))
    base, _ = lf.load_model(str(model), device="cpu")
    with RunFolder.open(tmp_path / "run", {"recipe": {}}, True) as run:
        run.keep_source(source_of(load_task("completion", path, seed=seed), path, seed))
    adapter = lf.patch(base, lf.LofitConfig(offset=[(0, 1)])).save(tmp_path / "run" / "adapter")
    options = ("heads", "--model", model, "--adapter", adapter, "--data", path)
    assert as_json(*options)["prompt"] == first_held_out(path, seed)
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    with pytest.warns(UserWarning, match="gives other rows to judge by"):
        call(*options)


def first_held_out(path, seed):
    return load_task("completion", path, seed=seed).validation[0].prompt


def test_a_long_prompt_is_looked_at_as_a_whole(model, run_folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    seen = {}
    monkeypatch.setattr(heads_page, "attention_panels", lambda maps, tokens, path: seen.update(maps) or picture(path))
    page = tmp_path / "heads.html"
    adapter = run_folder / "adapter"
    call("heads", "--model", model, "--adapter", adapter, "--prompt", "ab" * 60, "--output", page)
    rows = [weights.sum(1) for weights in seen.values()]
    # what the heads give to the tokens that are not shown is not shared among those that are
    assert rows and all(len(row) == 96 and row.max() < 1 for row in rows)
    assert "These are the last 96 tokens of the prompt. What the heads give to the 25 before them" in page.read_text()
    too_long = error_of("heads", "--model", model, "--adapter", adapter, "--prompt", "ab" * 600, "--output", page)
    assert "the page shows attention over 1024 at most" in too_long


def picture(path):
    path.write_bytes(b"")
    return path


def test_vectors_for_answers_act_where_an_answer_would_begin(model, tmp_path):
    base, _ = lf.load_model(str(model), device="cpu")
    handle = lf.patch(base, lf.LofitConfig(offset=[(0, 1)], positions="answer"))
    randomize(handle, std=3.0)
    ids = [5, 6, 7]
    got = attention_maps(handle, ids, [(1, 0)])[1, 0]
    twin, _ = lf.load_model(str(model), device="cpu")
    twin = lf.patch(twin, lf.LofitConfig(offset=[(0, 1)]))
    plain = attention_maps(twin, ids, [(1, 0)])[1, 0]
    assert torch.equal(got[:-1], plain[:-1]) and not torch.allclose(got[-1], plain[-1], atol=1e-4)


def test_an_adapter_of_another_base_is_said(model, run_folder, tmp_path):
    base, _ = lf.load_model(str(model), device="cpu")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    other = lf.patch(base, lf.LofitConfig(offset=[(0, 1)])).save(tmp_path / "other")
    options = ("--prompt", "a=", "--compare", other)
    with pytest.warns(UserWarning, match=f"the adapter in {other} was trained on other weights"):
        call("heads", "--model", model, "--adapter", run_folder / "adapter", *options)


def test_bad_calls(model, run_folder, tmp_path):
    adapter = run_folder / "adapter"
    base = ("heads", "--model", model, "--adapter", adapter)
    assert "so there is nothing for --task" in error_of(*base, "--prompt", "a", "--task", "kinship")
    assert "is named more than once" in error_of(*base, "--compare", adapter)
    assert "is no adapter folder" in error_of(*base, "--prompt", "a", "--compare", tmp_path)
    assert "--tokens: got 0" in error_of(*base, "--tokens", "0")
