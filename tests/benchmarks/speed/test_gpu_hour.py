"""The hour with a GPU: resumed parts, what falls, its statuses and summary; one rehearsal from end to end."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.peers.peer import AS_RUN, SAME_ENGINE
from benchmarks.speed.gpu import hour, hour_parts, hour_predictions, hour_rows, hour_summary, step_trace, whole_models
from benchmarks.speed.gpu.gpu_session import CANNOT_RUN, SOME_RED, TIMED
from benchmarks.speed.gpu.hour_parts import PARTS, Part, Turn
from benchmarks.speed.gpu.hour_predictions import Compared
from benchmarks.speed.gpu.whole_steps import rows_of_step, time_steps
from benchmarks.speed.step.row_settings import STOCK
from benchmarks.speed.step.rows import Row, live
from benchmarks.speed.step.steps import vectors
from lofit_kernels import dispatch
from lofit_kernels.roofline import DEVICES
from lofit_kernels.shapes import SHAPES

ROOT = Path(__file__).parents[3]
MACHINE = {"device": "cpu", "versions": {"torch": "2"}, "commit": "abc", "dirty": False}


class Answers:
    """A worker that answers by kind of task, and keeps what it was asked."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def run(self, task, seconds, *_):
        self.asked.append(task)
        answer = self.answers[task["kind"]]
        return answer(task) if callable(answer) else answer

    def close(self):
        pass


def a_turn(worker, data=None, minutes=5.0):
    return Turn("cpu", minutes, {} if data is None else data, {}, worker, lambda: None)


@pytest.fixture
def parts(monkeypatch):
    """Two parts instead of all: "first" is finished at once, "second" at its second call."""
    calls = []

    def first(turn):
        calls.append("first")
        return True

    def second(turn):
        calls.append("second")
        turn.data["calls"] = turn.data.get("calls", 0) + 1
        return turn.data["calls"] == 2

    table = {"first": Part("one", first, 5.0), "second": Part("two", second, 5.0)}
    monkeypatch.setattr(hour, "PARTS", table)
    monkeypatch.setattr(hour, "Isolated", lambda device: Answers(machine=MACHINE))
    return calls


def test_a_finished_part_is_not_run_again_and_an_unfinished_one_goes_on(parts, tmp_path):
    arguments = ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert hour.main(arguments) == hour.UNFINISHED == 4
    assert hour.main(arguments) == TIMED
    assert hour.main(arguments) == TIMED
    assert parts == ["first", "second", "second"]
    kept = json.loads((tmp_path / "out" / "hour.json").read_text())
    assert kept["parts"]["second"]["calls"] == 2 and kept["machine"] == MACHINE
    assert "rehearsal, not a measurement" in (tmp_path / "out" / "summary.md").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_part_alone(parts, tmp_path):
    assert hour.main(["--device", "cpu", "--output", str(tmp_path), "--part", "first"]) == TIMED
    assert parts == ["first"]


def test_an_interrupted_part_keeps_what_it_found(parts, tmp_path, monkeypatch):
    def interrupted(turn):
        turn.data["found"] = 1
        raise KeyboardInterrupt

    monkeypatch.setitem(hour.PARTS, "first", Part("one", interrupted, 5.0))
    with pytest.raises(KeyboardInterrupt):
        hour.main(["--device", "cpu", "--output", str(tmp_path)])
    kept = json.loads((tmp_path / "hour.json").read_text())["parts"]["first"]
    assert kept["found"] == 1 and not kept["finished"]


def test_results_of_two_machines_are_not_mixed(parts, tmp_path, monkeypatch, capsys):
    arguments = ["--device", "cpu", "--output", str(tmp_path)]
    hour.main(arguments)
    monkeypatch.setattr(hour, "Isolated", lambda device: Answers(machine=MACHINE | {"commit": "def"}))
    assert hour.main(arguments) == CANNOT_RUN
    assert "commit: abc there, def here" in capsys.readouterr().err


def test_every_part_is_below_nine_minutes_and_has_rows():
    assert all(part.minutes < hour.LONGEST for part in PARTS.values())
    for device in ("cuda", "cpu"):
        for part in ("op", "op-more", "layer"):
            rows = hour_rows.timed_rows(part, device)
            assert rows and len(set(rows)) == len(rows) and all(row.model in SHAPES for row in rows)
    timed = hour_rows.timed_rows("op", "cuda")
    assert {row.T for row in timed} == {128, 512, 4096, 16384} and len({row.model for row in timed}) == 4
    assert all(model in whole_models.MODELS for model, _ in (*hour_rows.STEPS, *hour_rows.TRACED))


GROUP = {"rows": [], "layers": 2, "of_layers": 2}


def test_a_row_of_whole_steps_that_falls_is_left_out():
    def answer(task):
        if "hook, step 1, as run" in task["without"]:
            return GROUP
        return {"error": "the process died with status -11: ", "at": "hook, step 1, as run"}

    turn = a_turn(Answers(steps=answer))
    assert hour_parts.whole("steps", (("Llama-3-8B", "step 1"),))(turn)
    group = turn.data["groups"]["Llama-3-8B, step 1"]
    assert group["fallen"] == {"hook, step 1, as run": "the process died with status -11: "}
    report = {"parts": {"steps": turn.data}}
    assert "hook, step 1, as run: the process died" in hour_summary.faults(report)[0]


def test_a_model_that_cannot_be_built_costs_its_own_group():
    def answer(task):
        return GROUP if task["model"] == "B" else {"error": "no transformers", "at": "building the model"}

    turn = a_turn(Answers(steps=answer))
    assert hour_parts.whole("steps", (("A", "step 1"), ("B", "step 1")))(turn)
    assert [group.get("error") for group in turn.data["groups"].values()] == ["no transformers", None]
    # and are both known now
    again = a_turn(turn.worker, turn.data)
    assert hour_parts.whole("steps", (("A", "step 1"), ("B", "step 1")))(again) and len(turn.worker.asked) == 2


@pytest.mark.parametrize(
    "run", [hour_parts.whole("steps", hour_rows.STEPS), hour_parts.answers, hour_parts.timed("op")]
)
def test_without_time_a_part_is_not_finished(run):
    turn = a_turn(Answers(check={"checked": 1, "problems": [], "missing": []}), minutes=0)
    assert run(turn) is False
    assert turn.worker.asked == []


def test_timing_checks_first_and_goes_by_the_verdicts_that_are_there():
    def check(task):
        return {"checked": 1, "problems": ["y: error"] * (task["peer"] == "hook"), "missing": []}

    def row(task):
        return {"rows": {name: {"ms": 1.0, "host_ms": 1.0} for name in task["peers"]}}

    turn = a_turn(Answers(check=check, projection=row))
    turn.checks["ours"] = {"checked": 5, "problems": [], "missing": [], "ours": True}
    turn.only = ("ours", "hook")
    assert hour_parts.timed("op")(turn)
    checked = [task["peer"] for task in turn.worker.asked if task["kind"] == "check"]
    assert checked == ["hook", "compiled_hook"]
    assert [list(row["peers"]) for row in turn.data["rows"]] == [["floor", "ours", "compiled_hook", "hook"]] * 2
    assert hour.status({"parts": {"op": {**turn.data, "finished": True}}, "checks": turn.checks}, ["op"]) == SOME_RED


def test_tests_without_pytest_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    turn = a_turn(Answers())
    assert hour_parts.gpu_tests(turn)
    assert turn.data == {"rows": [], "not_run": [], "absent": "pytest is not installed: no test was run"}


def test_outcomes_of_tests_are_read(tmp_path):
    cases = '<testcase classname="a" name="b"/><testcase classname="a" name="c"><failure message="boom"/></testcase>'
    cases += '<testcase classname="a" name="d"><skipped message="no GPU"/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = hour_parts._outcomes(tmp_path / "tests.xml")
    assert found["counts"] == {"tests": 3, "failed": 1, "skipped": 1}
    assert found["failed"] == ["a::c: boom"] and found["skipped"] == ["no GPU"]


def test_fewer_layers_where_memory_is_short():
    every = whole_models.n_layers("Llama-3-8B", "cuda")
    fits = [whole_models.layers_that_fit("Llama-3-8B", "cuda", gib * 2**30) for gib in (8, 24, 48, 80, 140)]
    assert fits == sorted(fits) and fits[0] == 1 and fits[-1] == every and 1 < fits[1] < every
    assert whole_models.layers_that_fit("Gemma-2-9B", "cpu", None) == 2


def test_a_sharing_copy_has_the_same_weights_in_other_modules():
    model = whole_models.built("Gemma-2-9B", "cpu", layers=1)
    copied = whole_models.sharing(model)
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in model.parameters()]
    projections = [m.model.layers[0].self_attn.o_proj for m in (model, copied)]
    assert projections[0] is not projections[1]
    assert copied.config is not model.config


def toy_task(**changed):
    left_out = (
        "compiled_hook, step 2, same engine",
        "compiled_hook, step 2, as run",
        "lora, as run",
        "lora_all, as run",
    )
    without = dict.fromkeys((*left_out, "lora, same engine"), "")
    task = {"model": "Gemma-2-9B", "step": "step 2", "device": "cpu", "without": without, "now": lambda what: None}
    return task | {"rounds": 1, "examples": 8, "seconds": 1.0} | changed


def test_whole_steps_are_checked_and_timed():
    found = time_steps(toy_task())
    assert found["layers"] == found["of_layers"] == 2
    assert len(found["rows"]) == len(rows_of_step("step 2")) - len(toy_task()["without"])
    timed = {(row["peer"], row["setting"]): row for row in found["rows"]}
    for row in timed.values():
        assert "absent" in row or (row["check"]["ok"] and row["tokens_per_s"] > 0 and "vs_hook" in row)
    assert timed["floor", SAME_ENGINE]["vs_floor"]["median"] == 1


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch):
    from benchmarks.peers import table

    floor = table.PEERS["floor"].attach

    def wrong(model, vectors):
        for layer in model.model.layers:
            # a copy: the weights themselves are everybody's
            layer.self_attn.o_proj.weight = torch.nn.Parameter(-3 * layer.self_attn.o_proj.weight)
        return floor(model, vectors)

    rows = [row for row in rows_of_step("step 2") if row.peer in ("lora", "floor")]
    monkeypatch.setattr("benchmarks.speed.gpu.whole_steps.rows_of_step", lambda step: rows)
    monkeypatch.setitem(table.TIMED, "lora", table.Peer("wrong", attach=wrong))
    found = time_steps(toy_task(model="Llama-3-8B", without={}))
    red = {(row["peer"], row["setting"]) for row in found["rows"] if "red" in row}
    assert {peer for peer, _ in red} == {"lora"}
    assert all(("ms_per_round" in row) == (row["peer"] == "floor") for row in found["rows"])


def test_out_of_memory_means_fewer_layers(monkeypatch):
    tried = []

    def timed(place, task):
        tried.append(place.model.config.num_hidden_layers)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("full")
        return {"rows": [], "layers": tried[-1]}

    monkeypatch.setattr("benchmarks.speed.gpu.whole_steps._timed", timed)
    found = time_steps(toy_task())
    assert tried == [2, 1] and found["short_of_memory_with_layers"] == [2] and found["layers"] == 1


@pytest.mark.parametrize("peer", ["floor", "hook", "lora", "lora_all"])
def test_a_peer_in_a_model_elsewhere_leaves_nothing_on_the_cpu(monkeypatch, peer):
    if peer.startswith("lora"):
        pytest.importorskip("peft")
    # on torch's meta device a tensor of the CPU that meets one of the model's raises
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, fused, **rest: torch.optim.Adam(parameters, **rest))
    model = whole_models.built("Gemma-2-9B", "cpu", layers=1).to("meta")
    drawn = vectors(model, "step 1")
    assert drawn and all(rows.device.type == "meta" for _, rows in drawn.values())
    stock = replace(STOCK, attention="eager")
    work = whole_models.random_examples("Gemma-2-9B", "cpu")
    with live(model, Row(peer, AS_RUN, "step 1"), stock, whole_models.sharing, stock) as one:
        batch = one.batches(work.drawn(0, 8), work.pad)[0]
        assert one.update(batch).device.type == "meta"


def event(name, start, end, device=DeviceType.CPU, annotation=False):
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


def test_what_a_profile_counts():
    cuda = DeviceType.CUDA
    events = [
        event(step_trace._MARK, 10, 100),
        event(step_trace._MARK, 12, 140, cuda, annotation=True),
        # before and after the steps: the clock's own
        event("cudaDeviceSynchronize", 1, 5),
        event("cudaDeviceSynchronize", 101, 140),
        event("aten::mm", 11, 12),
        event("cudaLaunchKernel", 12, 13),
        event("cuLaunchKernelEx", 14, 15),
        event("aten::_local_scalar_dense", 20, 30),
        event("cudaStreamSynchronize", 21, 30),
        event("gemm", 20, 30, cuda),
        event("sweep", 25, 40, cuda),
        event("Memcpy DtoH (Device -> Pageable)", 50, 51, cuda),
        event("gemm", 52, 62, cuda),
    ]
    found = step_trace.counted(events, steps=2)
    assert (found["launches"], found["synchronisations"], found["kernels"]) == (1.0, 0.5, 1.5)
    assert (found["copies to the host"], found["copies to the device"]) == (0.5, 0.0)
    assert found["reads of a number"] == {"aten::_local_scalar_dense": 0.5}
    # idle from 40 to 50 and from 51 to 52, of 42 in all
    assert found["idle"]["idle_ms"] == pytest.approx(11e-3 / 2) and found["idle"]["long_gaps"] == 0.5
    assert found["idle"]["share"] == pytest.approx(11 / 42)
    assert found["most time"][0] == {"name": "gemm", "ms": pytest.approx(20e-3 / 2), "calls": 1.0}
    on_cpu = step_trace.counted(events[:1] + events[4:5], steps=1)
    assert on_cpu["operations"] == 1 and on_cpu["kernels"] is None and on_cpu["idle"] is None


def timed_peer(ratio, ms=1.0):
    return {"ms": ms, "host_ms": 9.0, "vs_floor": {"median": ratio, "low": ratio, "high": ratio}}


def test_predictions_stand_beside_what_was_measured():
    row = vars(hour_rows.timed_rows("op", "cuda")[0])
    peers = {"floor": timed_peer(1.0), "ours": timed_peer(1.5), "delta triton fused": timed_peer(2.0)}
    row = row | {"peers": peers | {"hook": {"skipped": "red"}, "fold aten": timed_peer(1.0)}}
    found = {one.peer: one for one in hour_predictions.compared_rows([row], DEVICES["H100"])}
    # step 1 has scales, which a fold cannot express
    assert set(found) == {"floor", "ours", "delta triton fused"}
    assert found["floor"].predicted == 1 and found["ours"].measured == 1.5 and found["ours"].predicted > 1
    misses = hour_summary.largest_misses(list(found.values()))
    assert "floor" not in [one.peer for one in misses] and misses[0].miss >= misses[-1].miss >= 1
    assert any("longer than the device" in line for line in hour_summary._seen(misses[0], list(found.values())))


@pytest.mark.parametrize(
    ("setting", "peer", "path"),
    [
        ("step 1", "ours", ("pass", "pass")),
        ("step 2", "ours", ("fold", "fold")),
        ("both", "ours", ("dither", "dither")),
        ("both few", "ours", ("dither", "dither")),
        ("few scales", "ours", ("dither", "dither")),
        ("step 2", "dither aten", ("dither", "dither")),
        ("step 2", "pass aten", ("fold", "fold")),
    ],
)
def test_a_prediction_is_of_the_path_that_runs(monkeypatch, setting, peer, path):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    shape = hour_predictions.shape_of("Gemma-2-9B", setting, 4096)
    assert hour_predictions.path_of(peer, shape, torch.bfloat16) == path


def test_the_worst_of_each_peer_are_the_largest_misses():
    def one(peer, measured, predicted):
        return Compared("row", peer, measured, measured, measured, predicted, 1, 1, 1, 1, False)

    rows = [one("a", 2, 1), one("a", 1, 1), one("b", 1, 3), one("c", 1, 1), one("d", 1.1, 1), one("floor", 9, 1)]
    assert [row.peer for row in hour_summary.largest_misses(rows)] == ["b", "a", "d"]


def test_devices_by_name():
    assert hour_predictions.device_of("NVIDIA H200", rehearsal=False).name == "H200"
    assert hour_predictions.device_of("cpu", rehearsal=False) is None
    assert hour_predictions.device_of("cpu", rehearsal=True).name == hour_predictions.STAND_IN


def test_a_summary_of_nothing_and_of_an_unknown_device():
    report = {"evidence": "GPU clock", "machine": MACHINE | {"device": "a GPU"}, "parts": {}}
    text = hour_summary.markdown(hour_summary.summary(report))
    assert "no row for this device" in text and "Nothing was measured." in text


# what the image of a GPU machine may lack
ABSENT = ("peft", "accelerate", "datasets", "trl", "matplotlib", "rich", "typer", "gguf", "psutil", "pytest")


# a process whose finder does not see them, as where they are not installed
HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_from_checks_to_summary(tmp_path):
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(HIDING.format(absent=ABSENT))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (bare, ROOT / "kernels", ROOT)))
    command = [sys.executable, "-m", "benchmarks.speed.gpu.hour", "--device", "cpu", "--output", str(out)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=880)
    assert done.returncode == TIMED, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((out / "summary.json").read_text())
    assert found["faults"] == [] and all(part["finished"] for part in found["parts"].values())
    assert len(found["misses"]) == 3 and len(found["steps"]) == len(hour_rows.STEPS)
    for group in found["steps"]:
        whys = {row["peer"] for row in group["rows"] if "absent" in row}
        assert whys == {"lora", "lora_all"}
        assert all("tokens_per_s" in row for row in group["rows"] if row["peer"] not in whys)
    assert found["tests"]["absent"] == "pytest is not installed: no test was run"
    files = list(out.iterdir())
    assert len(files) <= 8 and sum(file.stat().st_size for file in files) < 16e6
