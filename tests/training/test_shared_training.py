"""fit in several processes: what one process does with the same batches, and one writer."""

import json
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from transformers import TrainerCallback, TrainerControl

import lofit_fast as lf
from lofit_fast import extras, ranks, roll_call
from lofit_fast.models.device import name_of_chip
from lofit_fast.models.load import load_model
from lofit_fast.training import told_run, trainer
from lofit_fast.training.agreed_control import AgreedControl
from lofit_fast.training.shared_batches import Share, ShareCollator, SharedSteps, check_devices, own_rows
from tests.several_processes import in_processes
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model
from tests.training.shared_runs import (
    LAST_DIGIT,
    SHARED,
    UNEVEN,
    WAYS,
    Fail,
    Stop,
    assert_same_outcome,
    changed,
    dying_at,
    outcome,
    outcomes,
    preferred,
)
from tests.training.tiny_runs import EXAMPLES, HELD_OUT, assert_same_state, assert_whole, fit, state_of, vectors


class StopThis(TrainerCallback):
    """A clock that says stop to one process, after its first step. asked: what else it asks for."""

    def __init__(self, number, *asked):
        self.number, self.asked = number, asked

    def on_step_end(self, args, state, control, **_):
        if ranks.rank() == self.number:
            for name in ("should_training_stop", *self.asked):
                setattr(control, name, True)


def test_three_processes_do_what_one_does(tmp_path):
    # the last batch has one example: two of the processes have none of it
    data = {"examples": UNEVEN[:7], "eval_data": HELD_OUT}
    expected = outcome(tmp_path / "one", **data)
    for got, sent in in_processes(3, lambda rank: counted(lambda: outcome(tmp_path / "three", **data))):
        assert_same_outcome(got, expected)
        # of a step all vectors, and a batch's loss twice and its gradients' norm; of a batch to judge by a loss
        vectors_of = {"select": LAYERS * HEADS * HEAD_DIM, "tune": SHARED.top * HEAD_DIM}
        assert sent == [4 * n for of in vectors_of.values() for n in ([of + 3] * 2 + [1]) * 2]
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (tmp_path / "one", tmp_path / "three")]
    assert files[0] == files[1]
    assert_whole(tmp_path / "three")
    handle = lf.load(tiny_model("llama"), tmp_path / "three" / "adapter")
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(vectors(handle), expected[3], strict=True))


def test_the_evaluation_loss_depends_on_neither_batches_nor_processes(tmp_path):
    data = {"examples": UNEVEN[:6], "eval_data": UNEVEN[5:], "heads": [(1, 0)]}
    (expected,) = (row["eval_loss"] for row in outcome(tmp_path / "one", changed(tune_epochs=1), **data)[2])
    for _, _, history, _ in outcomes(2, tmp_path / "two", changed(tune_epochs=1, eval_batch_size=3), **data):
        assert [row["eval_loss"] for row in history] == [pytest.approx(expected, abs=LAST_DIGIT)]


def counted(call):
    """What a call returns, and the bytes of each sum over processes in it."""
    sent, reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor: sent.append(tensor.nbytes) or reduce(tensor)
    return call(), sent


def plant_means(monkeypatch):
    """Each process divides by its own labels, and the means are averaged."""
    begin = SharedSteps.begin

    def own(self, batches):
        n = begin(self, batches)
        return n if not self._ahead else max(1, sum(s.here_labels for s in self._ahead)) * ranks.count()

    monkeypatch.setattr(SharedSteps, "begin", own)


def plant_penalties(monkeypatch):
    """The L1 term is added in every process."""
    noted = trainer.AttachmentTraining.noted_loss

    def everywhere(self, loss, batches):
        return noted(self, loss, batches) + (0.0 if ranks.first() else self.extra_loss() / batches)

    monkeypatch.setattr(trainer.AttachmentTraining, "noted_loss", everywhere)


def plant_rows(monkeypatch):
    """A process without rows of its own learns from those of another."""
    monkeypatch.setattr(Share, "own", lambda self, value: value)


@pytest.mark.slow
@pytest.mark.parametrize("plant", [plant_means, plant_penalties, plant_rows])
def test_faults_are_noticed(tmp_path, monkeypatch, plant):
    expected = outcome(tmp_path / "one", examples=UNEVEN[:7])

    def work(rank):
        plant(monkeypatch)
        return outcome(tmp_path / "three", examples=UNEVEN[:7])

    with pytest.raises(AssertionError):
        for got in in_processes(3, work):
            assert_same_outcome(got, expected)


OWN_WAYS = {
    "prefix cache": {"recipe": changed(min_layer=1), "engine": lf.Engine(prefix_cache_gb=1.0)},
    "looked at": {"engine": lf.Engine(verify=True)},
    "gemma2": {"model": "gemma2"},
    "given heads": {"heads": [(0, 1), (2, 3)]},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, *OWN_WAYS])
def test_every_way_to_train(tmp_path, monkeypatch, way):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    how = {"examples": UNEVEN, **{**WAYS, **OWN_WAYS}[way]}
    expected = outcome(tmp_path / "one", **how)
    for got in outcomes(2, tmp_path / "two", **how):
        assert_same_outcome(got, expected, 1e-12 if how.get("dtype") == torch.float64 else 1e-5)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("n", [2, 3])
def test_a_real_model_learns_the_same(tmp_path, n):
    # the processes are forked, and have its pages in common
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    names = ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn", "Gus")
    pairs = zip(names, names[::-1], strict=True)
    rows = [{"prompt": f"Q: Who is {x}'s friend?\nA:", "completion": f" {y}" * (1 + len(x) % 2)} for x, y in pairs]

    def real(_, folder, recipe, **options):
        return lf.fit(model, tokenizer, rows, recipe, output_dir=folder, progress=False, **options)

    recipe = changed(top=5, select_epochs=1, tune_epochs=1)
    expected = outcome(tmp_path / "one", recipe, fitting=real)
    lf.handle_of(model).unpatch()
    for got in outcomes(n, tmp_path / "several", recipe, fitting=real, limit=1200.0):
        assert_same_outcome(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [changed(), changed(batch_size=4, select="saliency"), changed(min_layer=1)])
def test_preferences_are_shared_too(tmp_path, monkeypatch, recipe):
    pytest.importorskip("trl")
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    cached = lf.Engine(prefix_cache_gb=1.0 if recipe.min_layer else 0.0)
    how = {"recipe": recipe, "fitting": preferred, "engine": cached}
    expected = outcome(tmp_path / "one", **how)
    for got in outcomes(2, tmp_path / "two", **how):
        assert_same_outcome(got, expected)


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_processes(tmp_path):
    expected = outcome(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        # after an epoch of each step
        outcome(tmp_path / "cut", callbacks=[Stop()])
    for got in outcomes(2, tmp_path / "cut"):
        assert_same_outcome(got, expected)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(roll_call, "_GRACE", 0.5)
    recipe = changed(select="random")
    expected = outcomes(2, tmp_path / "whole", recipe)

    def work(rank):
        if rank == 1:
            dying_at(3)
        with pytest.raises(ranks.ElsewhereError) as found:
            outcome(tmp_path / "cut", recipe)
        return str(found.value)

    said, _ = in_processes(2, work, dying={1})
    assert "process 1 (" in said and "has ended or does not answer" in said
    assert_whole(tmp_path / "cut")
    for got, whole in zip(outcomes(2, tmp_path / "cut", recipe), expected, strict=True):
        assert_same_outcome(got, whole, 0)


def test_callbacks_agree_on_what_any_of_them_asks():
    def work(rank):
        control, agreed = TrainerControl(should_log=True), AgreedControl(rank == 1)
        agreed.on_train_begin(None, None, control)
        control.should_training_stop = rank == 1
        agreed.on_step_end(None, None, control)
        # where no process has callbacks that may ask nothing is sent
        silent = AgreedControl(False)
        silent.on_train_begin(None, None, control)
        other = TrainerControl(should_save=rank == 1)
        silent.on_step_end(None, None, other)
        return control.should_training_stop, control.should_log, control.should_save, other.should_save

    assert in_processes(2, work) == [(True, True, False, False), (True, True, False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [("should_save",), ("should_evaluate",)])
def test_what_a_callback_asks_of_one_process_all_do(tmp_path, asked):
    how = {"heads": [(1, 0)], "eval_data": HELD_OUT if "should_evaluate" in asked else None}
    expected = outcome(tmp_path / "one", callbacks=[StopThis(0, *asked)], **how)
    assert [len(row["step_losses"]) for row in expected[2] if "step_losses" in row] == [1]

    def work(rank):
        return outcome(tmp_path / "two", callbacks=[StopThis(1, *asked)], **how)

    for got in in_processes(2, work, timeout=10.0):
        assert_same_outcome(got, expected)
    assert_whole(tmp_path / "two")


class Poison(TrainerCallback):
    """Gradients that are not numbers in a step of step 2."""

    def on_step_begin(self, args, state, control, model=None, **_):
        if args.learning_rate == SHARED.tune_lr and state.global_step == 3:
            next(iter(lf.handle_of(model).parameters())).register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize("accumulation_steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_all_diverge_with_the_words_of_one_process(tmp_path, accumulation_steps):
    recipe = changed(select="random", accumulation_steps=accumulation_steps)

    def words(folder, poisoned):
        with pytest.raises(FloatingPointError) as found:
            outcome(folder, recipe, callbacks=[Poison()] * poisoned)
        return str(found.value)

    alone = words(tmp_path / "one", True)
    # in one of the processes only
    said = in_processes(2, lambda rank: words(tmp_path / "two", rank == 1))
    assert [text.replace("/two/", "/one/") for text in said] == [alone] * 2
    assert "in step 4" in alone and "checkpoint-2" in alone


def test_what_cannot_be_shared_is_refused_in_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(told_run, "_SEEN_WITHIN", 0.05)
    answer = [{"prompt": "a", "completion": "b"}]
    # what each process calls fit with, and what all of them say
    cases = [
        (lambda rank: {"recipe": changed(batch_size=5)}, "batch_size 5 does not divide into 2 processes"),
        (
            lambda rank: {"recipe": changed(batch_size=6, accumulation_steps=2)},
            "batch_size 6 does not divide into 2 processes x 2 accumulation_steps",
        ),
        (lambda rank: {"examples": answer}, "got 1 examples for 2 processes"),
        (lambda rank: {"examples": EXAMPLES[rank:]}, "expected the same training data in every process"),
        (lambda rank: {"eval_data": HELD_OUT[rank:]}, "expected the same evaluation data in every process"),
        (lambda rank: {"recipe": changed(seed=rank)}, "expected the same recipe in every process"),
        (lambda rank: {"engine": lf.Engine(packing=bool(rank))}, "expected the same engine in every process"),
        (lambda rank: {"folder": tmp_path / f"{rank}"}, "expected the same arguments in every process"),
        (lambda rank: {"folder": Path("mine")}, "is not the same folder for all processes: process 1 on"),
        (lambda rank: {"dtype": torch.float64} if rank else {}, "expected the same"),
        (lambda rank: {"examples": EXAMPLES * (1 - rank)}, ("the training data is empty", "process 1 of 2 failed in")),
        (lambda rank: {"wrong": rank}, "process 1"),
    ]

    def work(rank):
        os.chdir(tempfile.mkdtemp(dir=tmp_path))
        said = []
        for case, _ in cases:
            how = {"examples": EXAMPLES, "folder": tmp_path / "run", "recipe": SHARED, **case(rank)}
            if how.pop("wrong", 0):
                monkeypatch.setattr(extras, "version", lambda name: "0.0")
            model = tiny_model("llama", how.pop("dtype", torch.float32))
            before = state_of(model)
            with pytest.raises((ValueError, OSError, ranks.ElsewhereError)) as found:
                fit(model, **how)
            assert_same_state(model, before)
            said.append(str(found.value))
        return said

    for said in in_processes(2, work):
        words = [(text, [part] if isinstance(part, str) else part) for text, (_, part) in zip(said, cases, strict=True)]
        assert [(text, parts) for text, parts in words if not any(part in text for part in parts)] == []
    assert not (tmp_path / "run").exists()


# of what ends all of them tests/test_ranks.py has a faster one
@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(roll_call, "_GRACE", 0.5)

    def work(rank):
        model = tiny_model("llama")
        before = state_of(model)
        with pytest.raises((OSError, ranks.ElsewhereError)) as found:
            fit(model, tmp_path, SHARED, callbacks=[Fail()] * rank)
        assert_same_state(model, before, but=("modes", "config"))
        with pytest.raises(ranks.ElsewhereError, match="start all of them again"):
            fit(model, tmp_path, SHARED)
        return type(found.value).__name__, str(found.value)

    (kind, said), own = in_processes(2, work)
    assert own == ("OSError", "disk full")
    assert kind == "ElsewhereError" and "process 1 failed in training: OSError: disk full" in said


def test_every_process_has_its_own_rows_of_a_batch():
    def work(rank):
        batch = ShareCollator(lambda rows: {"rows": list(rows)}, len)(["a", "bb", "ccc", "dddd"])
        return own_rows("abcd"), batch["rows"], own_rows("a")

    got = in_processes(3, work)
    assert got == [(["a", "d"], ["a", "dddd"], ["a"]), (["b"], ["bb"], []), (["c"], ["ccc"], [])]


def test_what_is_dropped_at_random_is_drawn_for_each_process_and_step(monkeypatch):
    steps = SharedSteps(torch.nn.Dropout(0.5), 7)
    assert steps.drops and not SharedSteps(torch.nn.Dropout(0.0), 7).drops
    masks, before = {}, torch.random.get_rng_state()
    for rank, step in [(0, 0), (1, 0), (0, 1), (0, 0)]:
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        with steps.drawing(step):
            mask = steps.model(torch.ones(64)).bool()
        # a step that is trained again draws the same
        assert masks.setdefault((rank, step), mask).equal(mask)
    assert len({tuple(mask.tolist()) for mask in masks.values()}) == 3
    assert torch.random.get_rng_state().equal(before)


def test_one_accelerator_is_one_process_s(monkeypatch):
    check_devices([[("a", "cpu")], [("a", "cpu")]])
    check_devices([[("a", "cuda:0")], [("b", "cuda:0")], [("a", "cuda:1"), ("a", "cuda:2")]])
    for third in ([("a", "cuda:0")], [("a", "cuda:2"), ("a", "cuda:0")]):
        with pytest.raises(ValueError, match="processes 0 and 2 both have their model on cuda:0 of a"):
            check_devices([[("a", "cuda:0")], [("a", "cuda:1")], third])
    # where each process sees one of its own, all are the first
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    seen = []
    for uuid in ("b", "c"):
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device, uuid=uuid: SimpleNamespace(uuid=uuid))
        seen.append([("a", name_of_chip(torch.device("cuda:0")))])
    check_devices(seen)
    with pytest.raises(ValueError, match="both have their model on GPU-b"):
        check_devices(seen[:1] * 2)
    assert name_of_chip(torch.device("cpu")) == "cpu"


def test_one_that_is_apart_trains_alone(tmp_path):
    def work(rank):
        # somebody else's accelerate knows of both, before and after
        PartialState._reset_state()
        state = PartialState(cpu=True)
        with ranks.apart():
            got = outcome(tmp_path / f"{rank}", changed(select="random", tune_epochs=1))
        assert state.num_processes == PartialState().num_processes == ranks.count() == 2
        return got

    one, other = in_processes(2, work)
    assert_same_outcome(one, other, 0)
    assert json.loads((tmp_path / "1" / "state.json").read_text())["stage"] == "done"
