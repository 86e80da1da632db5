"""fit where FSDP2 shards the base: what one process does, in each way to ask for it."""

import os
import signal

import pytest

import lofit_fast as lf
from lofit_fast import ranks, roll_call
from lofit_fast.training import trainer
from tests.several_processes import in_processes
from tests.tiny_models import tiny_model
from tests.training.shared_runs import SHARED, Stop, assert_same_outcome, changed, outcome, preferred
from tests.training.tiny_runs import EXAMPLES, HELD_OUT, fit, vectors

fsdp = pytest.importorskip("torch.distributed.fsdp", reason="torch without torch.distributed")
ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def sharding_fit(model, folder, recipe, **options):
    """Of a model that its user has sharded."""
    for layer in model.model.layers:
        fsdp.fully_shard(layer)
    return fit(fsdp.fully_shard(model), folder, recipe, **options)


def asking_fit(model, folder, recipe, asked=ASKED, **options):
    """Of a whole model, as accelerate's launcher asks for FSDP2."""
    os.environ |= asked
    result = fit(model, folder, recipe, **options)
    assert isinstance(model, fsdp.FSDPModule) and not result.handle.in_parts
    return result


def test_sharded_base_is_fitted(tmp_path):
    data = {"examples": EXAMPLES[:7], "eval_data": HELD_OUT}
    expected = outcome(tmp_path / "one", **data)
    for got in in_processes(2, lambda rank: outcome(tmp_path / "two", fitting=asking_fit, **data)):
        assert_same_outcome(got, expected)
    handle = lf.load(tiny_model("llama"), tmp_path / "two" / "adapter", strict=True)
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(vectors(handle), expected[3], strict=True))


REFUSED = {
    "version 1": ({"FSDP_VERSION": "1"}, {}, "FSDP of version 1: expected fsdp_version: 2"),
    "checkpointing": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "fsdp_activation_checkpointing"),
    "products": (
        {},
        {"engine": lf.Engine(frozen_products="int8")},
        "frozen_products=int8 was asked for, but the mod",
    ),
    "prefix": ({}, {"engine": lf.Engine(prefix_cache_gb=1.0)}, "prefix_cache_gb=1.0 was asked for"),
}


def test_what_is_wrong_in_one_process_ends_all_before_weights_are_gathered(tmp_path):
    """One that says so while another gathers weights would be taken for weights, and torch ends the process."""

    def work(rank):
        said = []
        for how in ({"examples": EXAMPLES * (1 - rank)}, {"recipe": changed(batch_size=6 - rank)}, {"seed": rank}):
            given = {"examples": EXAMPLES, "recipe": SHARED, **how}
            with pytest.raises((ValueError, ranks.ElsewhereError)) as found:
                asking_fit(tiny_model("llama", seed=given.pop("seed", 0)), tmp_path / "run", **given)
            said.append(str(found.value))
        return said

    first, second = in_processes(2, work)
    assert first[0].startswith("process 1 of 2 failed in reading the data") and "is empty" in first[0]
    assert "batch_size 5 does not divide" in first[1] and "batch_size 5 does not divide" in second[1]
    assert first[2] == second[2] and first[2].startswith("expected the same model in every process")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_that_is_gone_in_the_midst_of_a_forward_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(roll_call, "_GRACE", 0.5)
    compute, seen = trainer.LofitTrainer.compute_loss, []

    def work(rank, end):
        def failing(self, *args, **options):
            seen.append(None)
            return end() if rank == 1 and len(seen) == 2 else compute(self, *args, **options)

        monkeypatch.setattr(trainer.LofitTrainer, "compute_loss", failing)
        with pytest.raises((MemoryError, ranks.ElsewhereError)) as found:
            asking_fit(tiny_model("llama"), tmp_path, changed(select="random"), examples=EXAMPLES)
        return str(found.value)

    def fail():
        raise MemoryError("no room")

    first, second = in_processes(2, lambda rank: work(rank, fail))
    assert "process 1 failed in training: MemoryError: no room" in first and second == "no room"
    first, _ = in_processes(2, lambda rank: work(rank, lambda: os.kill(os.getpid(), signal.SIGKILL)), dying={1})
    assert "process 1 (" in first and "has ended or does not answer" in first


def test_what_a_sharded_base_cannot_have_is_refused(tmp_path):
    def work(rank):
        for asked, options, words in REFUSED.values():
            with pytest.raises(ValueError, match=words):
                asking_fit(tiny_model("llama"), tmp_path / "run", SHARED, {**ASKED, **asked}, **options)
            for name in asked:
                del os.environ[name]
        assert not (tmp_path / "run").exists()

    in_processes(2, work)


WAYS = {
    "user": (sharding_fit, {}),
    "gemma": (asking_fit, {"model": "gemma"}),
    "biases": (asking_fit, {"model": "qwen2"}),
    "accumulated": (asking_fit, {"recipe": changed(accumulation_steps=2, batch_size=12)}),
    "saliency": (asking_fit, {"recipe": changed(select="saliency")}),
    "early_stop": (asking_fit, {"recipe": changed(select="early_stop")}),
    "answers": (asking_fit, {"recipe": changed(positions="answer")}),
    "gathered": (lambda *args, **more: asking_fit(*args, {**ASKED, "FSDP_RESHARD_AFTER_FORWARD": "false"}, **more), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_sharded_base_is_fitted_in_each_way(way, n, tmp_path):
    fitting, options = WAYS[way]
    options = {**options, "examples": EXAMPLES[:7], "eval_data": HELD_OUT}
    expected = outcome(tmp_path / "one", **options)
    for got in in_processes(n, lambda rank: outcome(tmp_path / "many", fitting=fitting, **options), limit=200):
        assert_same_outcome(got, expected)


def test_preferences_on_a_sharded_base_are_refused(tmp_path):
    pytest.importorskip("trl", reason="no TRL, which trains on preferences")

    def work(rank):
        os.environ |= ASKED
        with pytest.raises(ValueError, match="cannot train on preferences: the model is sharded"):
            preferred(tiny_model("llama"), tmp_path / "run", SHARED)

    in_processes(2, work)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_process_goes_on_where_a_sharded_run_ended(tmp_path):
    """A checkpoint has whole vectors. The other way the run says what it was begun with."""
    expected = outcome(tmp_path / "whole")

    def cut(rank):
        with pytest.raises(KeyboardInterrupt):
            outcome(tmp_path / "several", fitting=asking_fit, callbacks=[Stop()])

    with pytest.raises(KeyboardInterrupt):
        outcome(tmp_path / "one", callbacks=[Stop()])

    def refused(rank):
        with pytest.raises(ValueError, match="holds a run that was begun with"):
            outcome(tmp_path / "one", fitting=asking_fit)

    in_processes(2, refused, limit=200)
    in_processes(2, cut, limit=200)
    assert_same_outcome(outcome(tmp_path / "several"), expected)
