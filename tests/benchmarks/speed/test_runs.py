"""Whole runs, losses, memory, prefix and profile cells on a tiny model."""

import statistics
from dataclasses import replace

import pytest
import torch

from benchmarks.peers.peer import AS_RUN, SAME_ENGINE, TUNED_STOCK
from benchmarks.speed.step import (
    answer_speed,
    fast_run,
    losses,
    peak_memory,
    prefix_speed,
    row_settings,
    step_profile,
    whole_run,
)
from benchmarks.speed.step.rows import Row, live
from benchmarks.speed.step.workload import task, workload
from lofit_fast.cpu.attention import GROUPED
from lofit_fast.data.pack import PackedCollator
from lofit_fast.training import CompletionCollator
from lofit_fast.training.engine import Engine
from lofit_fast.training.prefix_cache.store import PrefixStore
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import word_tokenizer

ENGINE = Engine(attention="eager", compile=False, packing=False)
SIZE = 16


@pytest.fixture(scope="module")
def work():
    return workload(word_tokenizer(), None, SIZE)


def tiny(**changes):
    return tiny_model("llama", max_position_embeddings=512, initializer_range=0.2, **changes)


@pytest.mark.parametrize("peer", whole_run.RUNS)
def test_whole_runs_see_as_many_examples(work, peer):
    if peer.startswith("lora"):
        pytest.importorskip("peft")
    report = whole_run.whole_run_seconds(peer, tiny(), word_tokenizer(), task(None, SIZE).train, work)
    seen = [loss for stage in report["losses"].values() for loss in stage]
    assert len(seen) == report["epochs"] == 2
    assert report["seconds"] > 0
    assert all(0 < loss < 20 for loss in seen)


@pytest.mark.parametrize(
    ("attention", "packing"),
    [
        pytest.param("eager", False, marks=pytest.mark.slow),
        pytest.param("eager", True, marks=pytest.mark.slow),
        (GROUPED, True),
    ],
)
def test_our_losses_are_the_hooks(work, attention, packing, monkeypatch):
    used, find = [], PrefixStore.find
    monkeypatch.setattr(PrefixStore, "find", lambda store, ids: used.append(ids) or find(store, ids))
    engine = replace(ENGINE, attention=attention, packing=packing)
    report = losses.loss_difference(tiny(), word_tokenizer(), task(None, SIZE).train, engine)
    # in step 2, from the prefix cache
    assert len(used) >= 2 * SIZE
    assert report["difference"] < 1e-4
    assert report["order_difference"] > 10 * report["difference"]
    assert [len(found) for found in report["losses"].values()] == [4, 4, 4]


def test_batches_are_recorded_in_training_alone_and_the_hook_goes():
    model, ids = tiny(), torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with losses.recorded_batches(model) as batches:
        model(**batch)
        model.train()
        model(**batch)
        model(**{**batch, "input_ids": ids + 1})
    model(**batch)
    assert [one["input_ids"].tolist() for one in batches] == [ids.tolist(), (ids + 1).tolist()]
    assert not model._forward_pre_hooks


def test_a_packed_batch_is_unpacked_as_it_was_padded(work):
    padded = CompletionCollator(work.pad)(work.rows[:3])
    lengths = padded["attention_mask"].sum(1).tolist()
    packed = {
        key: torch.cat([row[:n] for row, n in zip(padded[key], lengths, strict=True)])[None]
        for key in ("input_ids", "labels")
    }
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    again, plain = losses.as_stock(packed), losses.as_stock(padded)
    assert again.keys() == plain.keys()
    for key, expected in plain.items():
        mask = plain["attention_mask"].bool()
        assert torch.equal(again[key][mask], expected[mask]), key


def test_a_batch_with_a_shared_beginning_is_unpacked_as_it_was_padded(work):
    again = losses.as_stock(PackedCollator(work.pad)(work.rows[:3]))
    plain = losses.as_stock(CompletionCollator(work.pad, pad_to_multiple_of=1)(work.rows[:3]))
    mask = plain["attention_mask"].bool()
    assert again["attention_mask"].equal(plain["attention_mask"])
    assert all(again[key][mask].equal(plain[key][mask]) for key in ("input_ids", "labels"))


def test_memory_counts_what_a_step_needs(work, monkeypatch):
    monkeypatch.setattr(peak_memory, "settled_engine", lambda model, work: ENGINE)
    model, steps = tiny(), []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    report = peak_memory.peak_bytes(model, work, Row("hook", AS_RUN, "step 2"), steps=2)
    assert report["meter"] == "resident set"
    assert min(report["first_peak"], report["steady_peak"], report["loaded"]) > 0
    # a hook takes as many steps as ours, twice two
    assert len(steps) == 2 * report["steps"] == report["passes"] * report["steps"]
    assert "steady_peak" in peak_memory.peak_bytes(tiny(), work, Row("ours", SAME_ENGINE, "step 1"), steps=2)


def test_the_prefix_cache_is_timed_off_and_on(work):
    report = prefix_speed.prefix_speedup(tiny(num_hidden_layers=8), work, rounds=1, examples=8, engine=ENGINE)
    assert [(row["peer"], row["check"]["ok"], len(row["seconds"])) for row in report["rows"]] == [
        ("off", True, 1),
        ("on", True, 1),
    ]
    assert report["fill_seconds"] > 0


def test_the_profile_adds_up(work):
    report = step_profile.step_kinds(tiny(), work, Row("ours", SAME_ENGINE, "step 1"), ENGINE)
    # the rest is put under Python: what was counted twice would make it more than the whole
    assert sum(report["kinds"].values()) == pytest.approx(report["seconds_per_step"], rel=0.05)
    assert 0 < report["kinds"]["GEMM"] < report["seconds_per_step"]
    assert report["row"] == "ours, step 1, same engine"


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_a_fast_run_is_timed_whole_and_a_stock_loop_in_part(positions, work):
    pytest.importorskip("peft")
    inputs = fast_run.Loaded(lambda: (tiny(), word_tokenizer()), task(None, SIZE).train, work)
    how = {"positions": positions, "epochs": 1, "processes": False}
    report = fast_run.fast_run_seconds(inputs, part=SIZE // 2, **how)
    assert report["ratios"].keys() == report["whole_run_seconds"].keys() == fast_run.PEERS.keys()
    assert all(0 < made["low"] <= made["median"] <= made["high"] for made in report["ratios"].values())
    assert 0.3 < report["parts"]["share_of_tokens"] < 0.7
    # the median step of one epoch of each step stands for those of five over all examples
    share = report["parts"]["share_of_tokens"]
    steps = report["parts"]["step_seconds"]
    assert {stage: len(of) for stage, of in steps["hook"][0].items()} == {"select": 1, "tune": 1}
    medians = [statistics.median(of) for of in steps["hook"][0].values()]
    assert report["whole_run_seconds"]["hook"][0] == pytest.approx(5 * sum(medians) / share)
    assert report["whole_run_seconds"]["lora_all"][1] == pytest.approx(
        5 * statistics.median(steps["lora_all"][1]["tune"]) / share
    )
    # what the first batch of a process takes is not among them
    assert sum(medians) < report["parts"]["seconds"]["hook"][0]
    assert len(report["ours"]["losses"]) == 1
    assert (report["recipe"]["positions"], report["recipe"]["select"]) == (positions, "saliency")
    assert report["recipe"]["top"] == {"all": 0.1, "answer": 0.3}[positions]


def test_what_a_careful_user_switches_on_changes_no_batch(work):
    stock, careful = (Row("hook", setting, "step 2") for setting in (AS_RUN, TUNED_STOCK))
    with live(tiny(), stock, ENGINE) as one, live(tiny(), careful, ENGINE) as other:
        assert other.engine == replace(one.engine, large_pages=True)
        for mine, theirs in zip(one.batches(work.rows, work.pad), other.batches(work.rows, work.pad), strict=True):
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("fast", [True, False])
def test_autocast_is_for_who_would_use_it(work, monkeypatch, fast):
    monkeypatch.setattr(row_settings, "best_dtype", lambda device: torch.bfloat16 if fast else torch.float32)
    seen = {}
    for setting in (AS_RUN, TUNED_STOCK):
        with live(tiny(), Row("hook", setting, "step 2"), ENGINE) as one:
            layer = one.attached.model.model.layers[0].mlp.down_proj
            hook = layer.register_forward_hook(lambda *call, at=setting: seen.update({at: call[2].dtype}))
            one.loss(one.batches(work.rows[:2], work.pad)[0])
            hook.remove()
    assert seen == {AS_RUN: torch.float32, TUNED_STOCK: torch.bfloat16 if fast else torch.float32}


def test_answers_alone_are_timed_against_every_position(work):
    report = answer_speed.answer_speedup(tiny(), work, rounds=1, examples=8, engine=ENGINE, say=lambda text: None)
    assert list(report["steps"]) == ["step 1", "step 2"]
    for one in report["steps"].values():
        assert {name: len(seconds) for name, seconds in one["seconds"].items()} == {"all": 1, "answer": 1}
        assert 0 < one["speedup_with_filling"] < one["speedup"]["median"]
        assert one["tokens"]["answer"] < one["tokens"]["all"] / 4


def test_a_slow_first_batch_is_not_counted_up(monkeypatch, work):
    calls = []

    def run(model, tokenizer, examples, work):
        calls.append(len(examples))
        return {"step_seconds": {"select": [9.0, 1.0, 1.0], "tune": [2.0]}}

    monkeypatch.setitem(fast_run.RUNS, "hook", run)
    inputs = fast_run.Loaded(lambda: (None, None), task(None, SIZE).train, work)
    part = fast_run._part("hook", inputs)
    assert calls == [8, SIZE]
    assert fast_run._whole("hook", part["step_seconds"], batches=3) == 5 * 3 * (1.0 + 2.0)
