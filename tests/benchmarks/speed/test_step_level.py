"""Every peer computes what it should before it is timed, in both settings; a wrong one is not timed."""

import multiprocessing
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.peers.peer import AS_RUN, SAME_ENGINE, Absent, Attached, Peer
from benchmarks.peers.table import TIMED
from benchmarks.speed.step import loss_check, row_process, rows, step_level
from benchmarks.speed.step.rows import Row
from benchmarks.speed.step.steps import STEPS, vectors
from benchmarks.speed.step.workload import grouped_batches, stock_batches, workload
from lofit_fast.training import CompletionCollator
from lofit_fast.training.engine import Engine
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import word_tokenizer

ENGINE = Engine(attention="eager", compile=False, packing=False)
# compiling takes a minute and says nothing about losses that the eager hook does not say
ROWS = [
    Row(name, setting, step)
    for name, peer in TIMED.items()
    for setting in (AS_RUN, SAME_ENGINE)
    for step in (("step 1", "step 2") if peer.computes == "ours" else ("",))
    if name != "compiled_hook"
]


@pytest.fixture(scope="module")
def work():
    return workload(word_tokenizer(), None, 16)


def tiny(dtype=torch.float32, **changes):
    # attention that matters, as in a trained model: in bfloat16 nothing else would change the loss visibly
    return tiny_model("llama", dtype, max_position_embeddings=512, initializer_range=0.2, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
def test_every_peer_has_the_right_loss_and_seconds(work, dtype):
    pytest.importorskip("peft")
    report = step_level.step_seconds(
        tiny(dtype), work, ROWS, rounds=2, examples=10, engine=ENGINE, say=lambda line: None
    )
    assert [row for row in report["rows"] if "seconds" not in row] == []
    assert all(row["check"]["ok"] and len(row["seconds"]) == 2 for row in report["rows"])
    assert report["dtype"] == str(dtype).removeprefix("torch.")


def test_a_wrong_loss_is_not_timed(work, monkeypatch):
    def ignores_its_vectors(model, values):
        attached = TIMED["ours"].attach(model, values)
        return Attached(attached.model, attached.parameters, lambda other: None, attached.penalty)

    def not_here(model, values):
        raise Absent("not installed")

    monkeypatch.setitem(TIMED, "wrong", Peer("wrong", "ours", attach=ignores_its_vectors))
    monkeypatch.setitem(TIMED, "nowhere", Peer("nowhere", "ours", attach=not_here))
    said = []
    rows = [Row("wrong", AS_RUN, "step 2"), Row("ours", AS_RUN, "step 2"), Row("nowhere", SAME_ENGINE, "step 2")]
    wrong, ours, absent = step_level.step_seconds(
        tiny(), work, rows, rounds=1, examples=4, engine=ENGINE, say=said.append
    )["rows"]
    assert "expected" in wrong["red"] and "seconds" not in wrong
    assert len(ours["seconds"]) == 1
    assert "seconds" not in absent and absent["absent"] == "not installed"
    assert any("NOT TIMED" in line for line in said)


def test_a_check_that_proves_nothing_is_refused(work, monkeypatch):
    monkeypatch.setattr(loss_check, "CHECK_STDS", (0.0,))
    with pytest.raises(ValueError, match="prove nothing"):
        loss_check.references(tiny(), work, ["step 2"])


@contextmanager
def noted(base, row, engine, copied):
    """A row that notes its process and whether it has the loaded model itself; of some peers, one that fails."""
    if row.peer == "beft":
        raise KeyError("of this row")
    if row.peer == "ia3":
        os._exit(3)
    with rows.live(base, row, engine, copied) as one:
        yield replace(one, notes={"process": os.getpid(), "itself": one.attached.model is base})


def apart(rows, work):
    """Measured in processes of their own."""
    how = {"engine": ENGINE, "host": partial(row_process.apart, tiny), "opened": noted, "say": lambda line: None}
    return step_level.step_seconds(tiny(), work, rows, rounds=2, examples=8, **how)


@pytest.mark.slow
def test_rows_in_processes_of_their_own(work):
    rows = [Row("ours", SAME_ENGINE, "step 1"), Row("hook", AS_RUN, "step 2")]
    report = apart(rows, work)
    here = step_level.step_seconds(tiny(), work, rows, rounds=2, examples=8, engine=ENGINE, say=lambda line: None)
    assert report.keys() == here.keys() and report["graphs_compiled_while_timing"] == 0
    for row, expected in zip(report["rows"], here["rows"], strict=True):
        assert row.keys() - {"process", "itself"} == expected.keys()
        assert row["check"] == pytest.approx(expected["check"], rel=1e-5)
        assert len(row["seconds"]) == 2 and row["itself"]
    assert len({os.getpid(), *(row["process"] for row in report["rows"])}) == 3
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "peers, message",
    [
        (["floor", "beft"], r"(?s)^beft, as run: its process failed\n.*in noted.*KeyError: 'of this row'"),
        (["ia3"], "^ia3, as run: its process ended, with exit code 3$"),
    ],
)
def test_what_fails_in_a_process_is_an_error_here_and_leaves_none_behind(work, peers, message):
    with pytest.raises(RuntimeError, match=message):
        apart([Row(name, AS_RUN) for name in peers], work)
    assert multiprocessing.active_children() == []


def test_both_settings_batch_the_same_examples(work):
    rows = work.drawn(3, 12)
    assert rows != work.drawn(4, 12)
    stock, grouped = stock_batches(rows, work.pad), grouped_batches(rows, CompletionCollator(work.pad))
    assert [len(batch["input_ids"]) for batch in stock] == [8, 4]
    assert set(stock[0]) == {"input_ids", "attention_mask", "labels"}
    assert "logits_to_keep" in grouped[0]
    seen = [sorted(tuple(r[m.bool()].tolist()) for b in bs for r, m in _rows(b)) for bs in (stock, grouped)]
    assert seen[0] == seen[1]
    # the engine's widths are multiples of 8
    rounded = sum(len(b["input_ids"]) * -(-b["input_ids"].shape[1] // 8) * 8 for b in stock)
    assert sum(b["input_ids"].numel() for b in grouped) < rounded


def test_a_round_is_made_of_an_epochs_batches(work):
    def lengths(batches):
        return sorted(tuple(sorted(batch["attention_mask"].sum(1).tolist())) for batch in batches)

    epoch = lengths(grouped_batches(work.rows, CompletionCollator(work.pad)))
    for number in range(3):
        drawn = work.drawn(number, 16)
        assert set(lengths(grouped_batches(drawn, CompletionCollator(work.pad)))) <= set(epoch)
        ordered = [len(row["input_ids"]) for row in drawn]
        assert ordered != sorted(ordered)


def _rows(batch):
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


@pytest.mark.parametrize("step", STEPS)
def test_heads_of_a_row(step):
    model = tiny(num_hidden_layers=8)
    drawn = vectors(model, step)
    count = sum(len(heads) for heads, _ in drawn.values())
    lowest = min(layer for layer, _ in drawn)
    assert (count, lowest) == {"step 1": (32, 0), "step 2": (3, 0), "step 2, upper quarter": (3, 6)}[step]


def test_the_floor_reaches_as_low_as_an_adapter_and_no_lower(work):
    with rows.live(tiny(), Row("floor", SAME_ENGINE), ENGINE) as one:
        layer = one.attached.model.model.layers[0]
        reached = []
        layer.mlp.register_full_backward_hook(lambda *_: reached.append("mlp"))
        layer.self_attn.q_proj.register_full_backward_hook(lambda *_: reached.append("q_proj"))
        one.step(one.batches(work.drawn(0, 4), work.pad)[0])
    assert reached == ["mlp"]
