"""Runs whose second steps share each pass: equal to runs of their own up to rounding, each with its own folder."""

import json

import pytest
import torch

import lofit_fast as lf
from lofit_fast.patching.storage import read_adapter
from lofit_fast.training.sweep.grid import parse_grid
from lofit_fast.training.sweep.run import sweep
from lofit_fast.training.sweep.together_checks import check_no_dropout, check_plain_loss, check_rows_apart
from lofit_fast.training.sweep.together_step import JointStep
from lofit_fast.training.sweep.together_turns import Turn
from tests.patched_models import snapshot
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model
from tests.training.sweep.small_sweeps import run

pytestmark = pytest.mark.usefixtures("bare")
BASE = {"model": "tiny", "top": 2, "select_epochs": 1, "tune_epochs": 2, "batch_size": 4, "max_grad_norm": 0.5}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{a}=" * (1 + n % 3), "completion": a * (2 + n % 2)} for n, a in enumerate("abcdefghij")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def heads_file(path, heads):
    path.write_text(json.dumps([list(pair) for pair in heads]))
    return str(path)


def grid_of(data, tmp_path, base=None, runs=None):
    files = [heads_file(tmp_path / f"heads{n}.json", heads) for n, heads in enumerate(([(0, 1), (2, 0)], [(1, 3)]))]
    runs = runs or [
        {"name": "one", "seed": 1, "tune_lr": 0.02, "heads": files[0]},
        {"name": "two", "seed": 2, "tune_lr": 0.05, "heads": files[1], "tune_epochs": 3},
        {"name": "three", "seed": 3, "tune_lr": 0.01, "max_grad_norm": 0.01, "batch_size": 3},
        {"name": "four", "seed": 1, "tune_lr": 0.02, "train_size": 6, "batch_size": 4, "accumulation_steps": 2},
    ]
    return parse_grid({"base": {**BASE, "data": data, **(base or {})}, "runs": runs})


def history(folder):
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "tune"]


def assert_alike(got, expected, grid):
    for planned in grid.runs:
        ours, alone = (folder / "runs" / planned.name for folder in (got, expected))
        losses = [[x for row in history(folder) for x in row["step_losses"]] for folder in (ours, alone)]
        assert len(losses[0]) == len(losses[1]) > 0
        assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
        mine, theirs = (read_adapter(folder / "adapter") for folder in (ours, alone))
        assert mine.config == theirs.config
        assert all((mine.tensors[key] - theirs.tensors[key]).abs().max() < 1e-4 for key in theirs.tensors)
        assert mine.base_digest == theirs.base_digest


def test_two_runs_together_are_one_by_one(data, tmp_path):
    # of other heads, rates, clipping, and one that accumulates while the other steps
    heads = [heads_file(tmp_path / f"two{n}.json", of) for n, of in enumerate(([(0, 1), (2, 0)], [(1, 3)]))]
    runs = [
        {"name": "one", "seed": 1, "tune_lr": 0.02, "heads": heads[0]},
        {"name": "two", "seed": 2, "tune_lr": 0.05, "heads": heads[1], "accumulation_steps": 2, "max_grad_norm": 0.01},
    ]
    grid, model = grid_of(data, tmp_path, {"tune_epochs": 1}, runs), tiny_model("llama")
    before = snapshot(model)
    rows = run(grid, tmp_path / "together", model, together=2)
    assert snapshot(model) == before and lf.handle_of(model) is None
    assert [row["status"] for row in rows] == ["done"] * 2, rows
    run(grid, tmp_path / "alone")
    assert_alike(tmp_path / "together", tmp_path / "alone", grid)


@pytest.mark.slow
def test_together_is_one_by_one(data, tmp_path):
    grid, model = grid_of(data, tmp_path), tiny_model("llama")
    before = snapshot(model)
    rows = run(grid, tmp_path / "together", model, together=4)
    assert snapshot(model) == before and lf.handle_of(model) is None
    alone = run(grid, tmp_path / "alone")
    assert [row["status"] for row in rows] == ["done"] * 4, rows
    assert [row["name"] for row in rows] == [row["name"] for row in alone]
    assert_alike(tmp_path / "together", tmp_path / "alone", grid)
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(rows, alone, strict=True))
    # what is done is taken as it is, either way
    again = run(grid, tmp_path / "together", model, together=3)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_together(data, tmp_path, monkeypatch):
    grid, model, steps = grid_of(data, tmp_path), tiny_model("llama"), []
    before, compute = snapshot(model), JointStep.__call__

    def interrupted(self, wanted):
        steps.append(len(wanted))
        if len(steps) == 5:
            raise KeyboardInterrupt
        return compute(self, wanted)

    monkeypatch.setattr(JointStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(grid, tmp_path / "together", model, together=4)
    assert snapshot(model) == before
    rows = run(grid, tmp_path / "together", model, together=4)
    assert [row["status"] for row in rows] == ["done"] * 4
    run(grid, tmp_path / "alone")
    assert_alike(tmp_path / "together", tmp_path / "alone", grid)


@pytest.mark.slow
def test_a_run_that_diverges_leaves_the_others_alone(data, tmp_path):
    runs = [{"seed": 1, "tune_lr": 0.02}, {"seed": 2, "tune_lr": 1e38}, {"seed": 3, "tune_lr": 0.02}]
    grid = grid_of(data, tmp_path, {"tune_epochs": 3}, runs)
    rows = run(grid, tmp_path / "together", together=3)
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert "Diverged" in rows[1]["error"]
    fine = grid_of(data, tmp_path, {"tune_epochs": 3}, [runs[0], runs[2]])
    run(fine, tmp_path / "alone")
    assert_alike(tmp_path / "together", tmp_path / "alone", fine)


@pytest.mark.slow
def test_vectors_for_answers_are_trained_together(data, tmp_path):
    runs = [{"name": str(n), "seed": n, "tune_lr": 0.02, "positions": "answer"} for n in (1, 2)]
    grid = grid_of(data, tmp_path, None, runs)
    assert [row["status"] for row in run(grid, tmp_path / "together", together=2)] == ["done"] * 2
    run(grid, tmp_path / "alone")
    assert_alike(tmp_path / "together", tmp_path / "alone", grid)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ({"packing": True}, {"together": 2}, "packing=True was asked for"),
        ({"prefix_cache_gb": 1}, {"together": 2}, "prefix_cache_gb=1 was asked for"),
        ({"frozen_products": "int8"}, {"together": 2}, "frozen_products=int8 was asked for"),
        ({}, {"together": 0}, "expected together to be a whole number from 1, got 0"),
        ({}, {"together": 2, "jobs": 2}, "got together=2 and jobs=2"),
    ],
)
def test_what_cannot_be_had_together_is_refused_first(data, tmp_path, base, options, message):
    grid = grid_of(data, tmp_path, base)
    with pytest.raises(ValueError, match=message):
        sweep(grid, tmp_path / "refused", progress=False, **options)
    assert not (tmp_path / "refused").exists()


def test_dropout_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="a model with dropout"):
        run(grid_of(data, tmp_path), tmp_path / "refused", tiny_model("llama", attention_dropout=0.1), together=2)


def test_so_are_routers_that_draw_random_numbers():
    check_no_dropout(tiny_family("mixtral"))
    with pytest.raises(ValueError, match="PhimoeTopKRouter has router_jitter_noise=0.01"):
        check_no_dropout(tiny_family("phimoe"))


def test_so_is_a_loss_that_is_more_than_cross_entropy():
    model = tiny_family("qwen3_moe")
    check_plain_loss(model)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True adds a penalty"):
        check_plain_loss(model)


LONG = {
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [6.0] * 8, "original_max_position_embeddings": 16},
    "dynamic": {},
}


@pytest.mark.parametrize("kind", LONG)
def test_so_is_a_model_whose_rows_depend_on_the_length_of_others(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **LONG[kind]}
    check_rows_apart(tiny_model("llama"), 0)
    with pytest.raises(ValueError, match=r"rotary embedding depends on the length.*expected together=1"):
        check_rows_apart(tiny_model("llama", rope_parameters=rope), 0)


@pytest.mark.parametrize("what", ["padding", "rows"])
def test_so_is_a_model_in_which_a_row_changes_another(what):
    model = tiny_model("llama")

    def mixed(module, args, out):
        """The mean over the tokens of a row, or over the rows of a batch, as no mask keeps them out."""
        return out + out.mean(1 if what == "padding" else 0, keepdim=True) - out[:, :1] * (what == "padding")

    model.model.embed_tokens.register_forward_hook(mixed)
    with pytest.raises(ValueError, match="would change those of another"):
        check_rows_apart(model, 0)


def test_runs_that_cannot_go_on_together_are_trained_one_by_one(data, tmp_path, monkeypatch, capsys):
    grid = grid_of(data, tmp_path)
    asked = []

    def full(self, wanted):
        asked.append(len(wanted))
        if len(asked) == 2:
            raise torch.OutOfMemoryError("no room for 2 runs")
        return joint(self, wanted)

    joint = JointStep.__call__
    monkeypatch.setattr(JointStep, "__call__", full)
    rows = run(grid, tmp_path / "together", together=2)
    assert [row["status"] for row in rows] == ["done"] * len(rows)
    assert "cannot go on together (OutOfMemoryError: no room for 2 runs): each is trained by itself" in (
        capsys.readouterr().err
    )
    for got, alone in zip(rows, run(grid, tmp_path / "alone"), strict=True):
        assert got["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_turns_have_random_numbers_of_their_own():
    def draws(ask):
        torch.manual_seed(3)
        return [torch.rand(()).item(), ask("first"), torch.rand(()).item()]

    torch.manual_seed(3)
    expected = [torch.rand(()).item(), torch.rand(()).item()]
    torch.manual_seed(7)
    mine = torch.rand(()).item()
    torch.manual_seed(7)
    turns = [Turn(draws), Turn(draws)]
    assert all(turn.go_on() and turn.asked == "first" for turn in turns)
    assert not any(turn.go_on(number) for number, turn in enumerate(turns))
    for number, turn in enumerate(turns):
        assert turn.result == [expected[0], number, expected[1]]
    assert torch.rand(()).item() == mine


def test_a_turn_that_is_stopped_leaves_its_scopes():
    left = []

    def waits(ask):
        try:
            ask(1)
        finally:
            left.append(True)

    turn = Turn(waits)
    assert turn.go_on()
    turn.stop()
    assert left == [True] and turn.over and turn.error is None
    failing = Turn(lambda ask: 1 / 0)
    assert not failing.go_on() and isinstance(failing.error, ZeroDivisionError)
