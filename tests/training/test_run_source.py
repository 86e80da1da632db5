"""What a run says of its data, and what an adapter of it is judged by."""

import json

import pytest

from lofit_fast.sealed import write_sealed
from lofit_fast.tasks import Example, Task, load_task
from lofit_fast.training.run_folder import RunFolder
from lofit_fast.training.run_source import data_seed_of, kept_source, other_rows, source_of
from tests.ordinary_sample import some_now
from tests.training.sweep.small_sweeps import grid_of
from tests.training.sweep.small_sweeps import run as swept

ADAPTERS = ("adapter", "select/adapter", "select/checkpoint-2", "tune/checkpoint-3")


def written(path, numbers):
    path.write_text("".join(json.dumps({"prompt": f"{n}=", "completion": "x"}) + "\n" for n in numbers))
    return path


def begun(folder, source):
    with RunFolder.open(folder, {"recipe": {}}, True) as run:
        run.keep_source(source)
    for name in ADAPTERS:
        (folder / name).mkdir(parents=True)


def judged(data, seed, **options):
    return source_of(load_task("completion", data, seed=seed, **options), data, seed)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_of_a_run_has_its_seed_from_the_start(tmp_path, monkeypatch, name):
    begun(tmp_path / "run", {"data_seed": 7})
    assert data_seed_of(tmp_path / "run" / name) == 7
    monkeypatch.chdir(tmp_path / "run" / name)
    assert data_seed_of(".") == 7
    # one that somebody has put there, deeper than any of a run's
    assert data_seed_of(tmp_path / "run" / "mine" / "adapter") == 42


def test_a_run_of_an_earlier_release_has_it_in_its_summary(tmp_path):
    begun(tmp_path, None)
    assert data_seed_of(tmp_path / "tune" / "checkpoint-3", 5) == 5
    (tmp_path / "summary.json").write_text('{"data_seed": 7}')
    assert data_seed_of(tmp_path / "tune" / "checkpoint-3") == data_seed_of(tmp_path / "adapter") == 7
    for damaged in ('{"data_seed": "7"}', "{"):
        (tmp_path / "summary.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"give.* the data seed of the run \(--seed\)|give that of the run"):
            data_seed_of(tmp_path / "select" / "adapter")


def test_rows_of_one_prompt_are_told_apart_by_their_answers(tmp_path):
    path = tmp_path / "poems.jsonl"
    rows = [json.dumps({"prompt": "Poem:", "completion": f" {n}"}) + "\n" for n in range(30)]
    path.write_text("".join(rows))
    kept = judged(path, 7)
    begun(tmp_path / "run", kept)
    assert other_rows(tmp_path / "run" / "adapter", judged(path, 7)) is None
    path.write_text("".join(reversed(rows)))
    now = judged(path, 7)
    assert "gives other rows to judge by" in other_rows(tmp_path / "run" / "adapter", now)
    # of a run of an earlier release the prompts alone are known
    begun(tmp_path / "older", {name: value for name, value in kept.items() if name != "judged_by"})
    assert other_rows(tmp_path / "older" / "adapter", now) is None


def test_the_order_of_accepted_answers_is_no_matter():
    def held_out(answers):
        return source_of(Task("t", [], [Example("q", " a", answers)]), None, 1)["judged_by"]

    assert held_out(("a", "b")) == held_out(("b", "a")) != held_out(("a", "c"))


def test_adapters_of_no_run(tmp_path):
    assert data_seed_of(None) == 42 and kept_source(tmp_path / "adapter") == {}
    (tmp_path / "state.json").write_text('["somebody else\'s"]')
    with pytest.raises(ValueError, match="give the data seed"):
        kept_source(tmp_path / "adapter")
    write_sealed(tmp_path / "state.json", {"_fingerprint": "of datasets"})
    assert kept_source(tmp_path / "adapter") == {}


def test_rows_that_were_not_held_out_are_said(tmp_path):
    data = written(tmp_path / "data.jsonl", range(200))
    begun(tmp_path / "run", judged(data, 7))
    adapter = tmp_path / "run" / "tune" / "checkpoint-3"
    assert other_rows(adapter, judged(data, 7)) is other_rows(None, judged(data, 3)) is None
    assert "gives other rows to judge by" in other_rows(adapter, judged(data, 3))
    # other data is nobody's business
    other = written(tmp_path / "other.jsonl", range(50))
    assert other_rows(adapter, judged(other, 3)) is None
    written(data, reversed(range(200)))
    assert f"{data} gives other rows to judge by than the run of {adapter} has held out" in other_rows(
        adapter, judged(data, 7)
    )


@pytest.mark.parametrize("together", some_now([1, 2], 2))
def test_the_runs_of_a_sweep_say_it_too(tmp_path, together):
    data = str(written(tmp_path / "data.jsonl", range(20)))
    swept(grid_of(data, {"data_seed": 5}, tune_lr=[1e-2, 2e-2]), tmp_path / "sweep", together=together)
    adapters = list((tmp_path / "sweep" / "runs").glob("*/adapter"))
    assert [kept_source(adapter) for adapter in adapters] == [judged(data, 5)] * 2
