"""Profiles of steps: files, kinds of work that add up, FLOPs that are exact."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

import lofit_fast as lf
from lofit_fast.training import objectives
from lofit_fast.training.profiling import ProfileSteps, as_markdown, summarize
from tests.tiny_models import tokens
from tests.tiny_tokenizers import tiny_tokenizer

EXAMPLES = [{"prompt": f"{a}=", "completion": a * 2} for a in "abcdefghijklmnop"]
RECIPE = lf.Recipe(top=2, select_epochs=1, tune_epochs=1, batch_size=4)


def test_a_run_leaves_a_trace_and_a_table_per_stage(llama, tmp_path):
    lf.fit(
        llama,
        tiny_tokenizer(),
        EXAMPLES,
        RECIPE,
        output_dir=tmp_path,
        callbacks=[ProfileSteps(tmp_path, warmup=1, steps=2)],
        progress=False,
    )
    folder = tmp_path / "profile"
    assert {path.name for path in folder.iterdir()} == {
        f"{stage}{end}" for stage in ("select", "tune") for end in (".json.gz", ".md", "-summary.json")
    }
    summary = json.loads((folder / "tune-summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["kinds"].keys() >= {"GEMM", "optimizer", "data", "elementwise and copies"}
    assert sum(summary["kinds"].values()) == pytest.approx(summary["seconds_per_step"], rel=0.05)
    assert summary["flops_per_step"] > 0
    assert summary["operations_per_step"] > 100
    trace = json.loads(gzip.decompress((folder / "tune.json.gz").read_bytes()))
    assert sum("Optimizer.step" in event.get("name", "") for event in trace["traceEvents"]) == 2
    text = (folder / "tune.md").read_text()
    assert "| GEMM |" in text
    assert "GFLOP" in text


def test_a_stage_too_short_leaves_nothing_and_no_profiler(llama, tmp_path, monkeypatch):
    options = {"output_dir": tmp_path, "progress": False}
    callback = ProfileSteps(tmp_path, warmup=2, steps=5)
    lf.fit(llama, tiny_tokenizer(), EXAMPLES, RECIPE, callbacks=[callback], **options)
    assert not (tmp_path / "profile").exists()
    assert callback.profiler is None


class Stops(TrainerCallback):
    """Raises at the end of a step, as a full disk or a loss that is no number does."""

    def on_step_end(self, args, state, control, **_):
        """The second step of a stage."""
        if state.global_step == 2:
            raise RuntimeError("stopped here")


def test_a_run_that_fails_leaves_no_profiler_running(llama, tmp_path):
    callback = ProfileSteps(tmp_path, warmup=1, steps=2)
    how = {"output_dir": tmp_path, "progress": False}
    with pytest.raises(RuntimeError, match="stopped here"):
        lf.fit(llama, tiny_tokenizer(), EXAMPLES, RECIPE, callbacks=[callback, Stops()], **how)
    assert callback.profiler is None
    assert not torch.autograd._profiler_enabled()
    lf.fit(llama, tiny_tokenizer(), EXAMPLES, RECIPE, callbacks=[callback], **how)
    assert (tmp_path / "profile" / "tune.md").exists()


def test_a_trace_that_cannot_be_written_leaves_no_profiler_running(llama, tmp_path):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "profile").write_text("")
    callback = ProfileSteps(tmp_path / "traces", warmup=1, steps=1)
    how = {"output_dir": tmp_path / "run", "progress": False, "callbacks": [callback]}
    with pytest.raises(OSError, match="profile"):
        lf.fit(llama, tiny_tokenizer(), EXAMPLES, RECIPE, **how)
    assert callback.profiler is None


def test_a_stage_that_begins_stops_a_profiler_that_was_left(tmp_path):
    callback = ProfileSteps(tmp_path, warmup=0)
    begun = SimpleNamespace(is_world_process_zero=True)
    callback.on_train_begin(None, begun, None)
    callback.on_step_begin(None, begun, None)
    assert torch.autograd._profiler_enabled()
    callback.on_train_begin(None, begun, None)
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_are_those_of_the_flop_counter(llama, attention):
    llama.set_attn_implementation(attention)
    lf.patch(llama, lf.LofitConfig(scale="all"))
    batch = {"input_ids": tokens(2, 12), "labels": tokens(2, 12)}

    def step():
        llama(**batch, use_cache=False).loss.backward()

    with FlopCounterMode(display=False) as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    summary = summarize(profiler.events(), 1.0, 1)
    # products of (2 x 4 heads, 12, 16) with their like: forward everywhere, backward above the lowest scale
    products = 2 * 3 + 5 * 2 if attention == "sdpa" else 0
    # the counter does not know sdpa's kernel for CPUs
    assert summary["flops_per_step"] == counter.get_total_flops() + products * 2 * 8 * 12 * 12 * 16
    assert "attention" in summary["kinds"]


def event(name, own, parent=None, children=(), device="CPU"):
    return SimpleNamespace(
        name=name,
        self_cpu_time_total=own,
        self_device_time_total=10 * own,
        cpu_parent=parent,
        cpu_children=children,
        input_shapes=[],
        device_type=getattr(torch.autograd.DeviceType, device),
    )


def test_kinds_of_work():
    optimizer = event("Optimizer.step#AdamW.step", 1e6)
    within = event("aten::_foreach_mul_", 2e6, optimizer)
    events = [optimizer, within, event("aten::addmm", 4e6), event("aten::silu", 1e6), event("aten::bmm", 3e6)]
    # the second is how a compiled graph on a CPU appears, whose kernels have no names of their own
    events += [event("AddmmBackward0", 1e6), event("cpp_fused_add", 1e6), event("## Call CompiledFxGraph f2 ##", 1e6)]
    summary = summarize(events, 20.0, 2)
    assert summary["kinds"] == {
        "Python, autograd and waiting": 0.5 + 3.0,
        "GEMM": 2.0,
        "optimizer": 1.5,
        "attention": 1.5,
        "fused by the compiler": 1.0,
        "elementwise and copies": 0.5,
    }
    assert (summary["seconds_per_step"], summary["operations_per_step"]) == (10.0, 4 / 2)
    assert summary["operations"][0] == {"name": "aten::addmm", "seconds": 2.0, "calls": 0.5}
    assert "| GEMM | 2000.00 | 20.0 % |" in as_markdown(summary, "tune")


def test_on_a_gpu_its_time_and_its_launches_count():
    events = [event("aten::mm", 1e6), event("sm90_xmma_gemm", 0, device="CUDA"), event("add", 0, device="CUDA")]
    summary = summarize(events, 20.0, 1)
    assert (summary["device"], summary["launches_per_step"], summary["kinds"]["GEMM"]) == ("cuda", 2, 10.0)


def test_wrong_numbers_of_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps >= 1"):
        ProfileSteps(tmp_path, steps=0)
    with pytest.raises(ValueError, match="expected the path of a file or folder, got ''"):
        ProfileSteps("")


def test_history_has_the_rates_of_every_epoch(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "exact_match_accuracy", lambda *_, **__: 0.0)
    result = lf.fit(llama, tiny_tokenizer(), EXAMPLES, RECIPE, output_dir=tmp_path, progress=False)
    for row in result.history:
        assert row["examples_per_s"] * row["seconds"] == pytest.approx(16)
        # "a=aa" between a beginning and an end
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(16 * 6)
    assert {"examples_per_s", "peak_memory_bytes"} <= result.metrics["tune"].keys()
