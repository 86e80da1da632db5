"""The GPU script, rehearsed from end to end on a CPU with nothing but torch and Triton; what is red costs itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed.gpu import __main__ as script
from benchmarks.speed.gpu import gpu_report, gpu_rows, path_checks
from benchmarks.speed.gpu.gpu_session import NOTHING_TIMED, SOME_RED, TIMED, Pace, Session, left_out
from benchmarks.speed.gpu.isolation import Isolated
from benchmarks.speed.op import clock
from benchmarks.speed.op.decoder import DecoderLayer
from benchmarks.speed.op.operators import OPERATORS, Operator, floor, projection
from lofit_kernels.shapes import SHAPES

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
# what a GPU machine as found may lack
ABSENT = ("transformers", "peft", "safetensors", "accelerate", "matplotlib", "rich", "typer", "gguf", "pytest")


def run(tmp_path, *arguments):
    """The command in a process where importing any of ABSENT fails. Returns it and what it wrote."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for package in ABSENT:
        (bare / f"{package}.py").write_text(f"raise ImportError('{package} is not installed')\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (bare, ROOT / "kernels", ROOT)))
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.gpu",
        "--device",
        "cpu",
        "--quick",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    written = tmp_path / "out" / "gpu.json"
    return done, json.loads(written.read_text()) if written.exists() else None


@pytest.mark.slow
def test_rehearsal_from_checks_to_report(tmp_path):
    done, found = run(tmp_path, "--only", "ours", "hook", "original", "delta triton fused_backward", "fold triton")
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["evidence"] == "rehearsal, not a measurement"
    assert found["machine"]["device"] == "cpu" and found["machine"]["versions"]["torch"]
    assert {"commit", "dirty"} <= found["machine"].keys()
    checked = {name: row.get("checked") for name, row in found["checks"].items()}
    assert checked == {
        "ours": 5,
        "hook": 5,
        "original": 5,
        "delta triton fused_backward": 4,
        "fold triton": 1,
        "compiled_hook": None,
    }
    assert all(not row.get("problems") for row in found["checks"].values())
    assert [(row["level"], row["setting"]) for row in found["rows"]] == [("projection", "step 1"), ("layer", "step 2")]
    step_1, layer = (row["peers"] for row in found["rows"])
    assert step_1["floor"]["vs_floor"]["median"] == 1
    for name in ("ours", "hook", "original", "delta triton fused_backward"):
        assert step_1[name]["ms"] > 0 and step_1[name]["rounds"] == gpu_rows.ROUNDS["cpu"]
    assert "cannot express a scale" in step_1["fold triton"]["skipped"]
    assert step_1["compiled_hook"]["skipped"] == "left out: --quick"
    assert layer["the projection alone"]["ms"] > 0 and layer["floor"]["ms"] > 0
    assert layer["fold triton"]["ms"] > 0
    assert "no picture: matplotlib is not installed" in done.stdout
    assert "python -m pytest tests/kernels/gpu" in done.stdout


@pytest.mark.slow
def test_what_is_wrong_costs_its_own_path(tmp_path):
    done, found = run(tmp_path, "--only", "pass aten", "delta aten", "--plant", "pass aten")
    assert done.returncode == SOME_RED == 3, done.stdout + done.stderr
    assert "NOT TIMED, its check is red: pass aten" in done.stderr and "check pass aten: RED" in done.stdout
    assert any("y: error" in problem for problem in found["checks"]["pass aten"]["problems"])
    assert list(found["red"]) == ["pass aten"]
    step_1 = found["rows"][0]["peers"]
    assert "its check is red: RED" in step_1["pass aten"]["skipped"] and "y: error" in step_1["pass aten"]["skipped"]
    assert step_1["delta aten"]["vs_floor"]["median"] > 0


PACE = Pace(rounds=3, seconds=5.0)


STEP = {"ms": 1.0, "host_ms": 1.0}


class Right:
    """A worker for which everything is right, but for those it is told of."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def run(self, task, seconds, *_):
        if task["kind"] == "check":
            return self.answers.get(task["peer"], {"checked": 1, "problems": [], "missing": []})
        self.asked.append(task["peers"])
        bad = next((name for name in task["peers"] if name in self.answers.get("bad", {})), None)
        return self.answers["bad"][bad] if bad else {"rows": {name: STEP for name in task["peers"]}}


def a_session(worker, minutes=8.0, report=None):
    return Session("cpu", minutes, {} if report is None else report, worker)


RED = {
    "wrong": {"checked": 3, "problems": ["y: error 1e-2, allowed 1e-3"], "missing": []},
    "crashed": {"error": "the process died with status -11: ", "at": "toy T=5 float32 both"},
    "hung": {"error": "silent for 60 s", "at": "toy T=5 float32 both"},
    "broke the device": {"checked": 1, "problems": [], "missing": [], "broken": "an illegal memory access"},
}


@pytest.mark.parametrize("found", RED.values(), ids=RED)
def test_a_red_check_leaves_the_others_to_be_timed(found):
    session = a_session(Right(hook=found))
    session.check(["floor", "hook", "ours"], gpu_rows.CHECKS["cpu"])
    session.time(["floor", "hook", "ours"], gpu_rows.ROWS["cpu"], PACE)
    assert session.worker.asked == [["floor", "ours"]] * 2
    assert session.status() == SOME_RED
    for row in session.report["rows"]:
        assert row["peers"]["hook"]["skipped"].startswith("its check is red: RED, 1 problems")
        assert row["peers"]["ours"] == STEP


def test_with_every_check_red_nothing_is_timed(capsys):
    session = a_session(Right(hook=RED["hung"], ours=RED["wrong"]))
    session.check(["floor", "hook", "ours"], gpu_rows.CHECKS["cpu"])
    session.time(["floor", "hook", "ours"], gpu_rows.ROWS["cpu"], PACE)
    assert session.worker.asked == [["floor"]] * 2
    assert session.status() == NOTHING_TIMED
    assert a_session(None).status() == NOTHING_TIMED


def test_all_right_is_status_0_and_nobody_is_timed_unchecked():
    session = a_session(Right())
    session.check(["floor", "hook"], gpu_rows.CHECKS["cpu"])
    session.time(["floor", "hook", "ours"], gpu_rows.ROWS["cpu"], PACE)
    assert session.status() == TIMED == 0
    assert session.report["rows"][0]["peers"]["ours"] == {"skipped": "left out: it was not checked"}
    assert left_out(["ours"], {"ours": {"left_out": "--quick"}}) == {"ours": "left out: --quick"}


def test_what_is_known_is_not_run_again():
    worker, report = Right(), {}
    for _ in range(2):
        session = a_session(worker, report=report)
        session.check(["floor", "hook"], gpu_rows.CHECKS["cpu"])
        session.time(["floor", "hook"], gpu_rows.ROWS["cpu"], PACE)
    assert len(worker.asked) == len(report["rows"]) == 2


def test_no_time_left_is_said():
    session = a_session(None, minutes=0)
    session.check(["floor", "hook"], gpu_rows.CHECKS["cpu"])
    assert session.report["checks"] == {"hook": {"left_out": "out of time"}}
    session.time(["floor", "hook"], gpu_rows.ROWS["cpu"], PACE)
    assert session.report["rows"] == []
    assert [row["reason"] for row in session.report["not_run"]] == ["out of time"] * len(gpu_rows.ROWS["cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert script.main(["--only", "hook"]) == 2
    assert "torch sees no GPU here; --device cpu rehearses" in capsys.readouterr().err


def test_unmet_requirements_are_named(monkeypatch, capsys):
    monkeypatch.setattr(script, "REQUIRED", {"torch": (99, 0), "no-such-package": (3, 6)})
    assert script.main([]) == 2
    error = capsys.readouterr().err
    assert "torch >= 99.0 is needed" in error and "no-such-package >= 3.6 is not installed" in error
    monkeypatch.undo()
    assert script.lacking() == []
    assert script.main(["--plant", "nothing"]) == 2


# a worker that says what it is about to do, and then hangs or dies
BEGINS = "input(); print('@now pass triton', flush=True)"
ANSWERS = "for line in sys.stdin: print('noise'); print('@lofit {\"broken\": \"x\"}', flush=True)"


@pytest.mark.parametrize(
    "code, seconds, silence, expected, at",
    [
        ("print('last words', file=sys.stderr, flush=True); os._exit(9)", 60, 60, "status 9: last words", None),
        ("input(); time.sleep(60)", 1, 60, "no answer within 1 seconds", None),
        (f"{BEGINS}; time.sleep(60)", 60, 0.5, "silent for 0 s", "pass triton"),
        (f"{BEGINS}; os._exit(9)", 60, 60, "died with status 9", "pass triton"),
    ],
)
def test_a_worker_may_die_or_hang(code, seconds, silence, expected, at):
    worker = Isolated("cpu", [sys.executable, "-c", f"import os, sys, time; {code}"])
    for _ in range(2):
        # and is started again for the next task
        found = worker.run({"kind": "check"}, seconds, silence)
        assert expected in found["error"] and found["at"] == at
    worker.close()


def test_a_worker_that_broke_its_device_is_replaced():
    worker = Isolated("cpu", [sys.executable, "-c", f"import sys\n{ANSWERS}"])
    assert worker.run({}, 20) == {"broken": "x"}
    first = worker.process
    assert worker.run({}, 20) == {"broken": "x"}
    assert first is None and worker.process is None
    worker.close()


FALLS = {
    "broke the device": {"rows": {"bad": {"error": "illegal access"}}, "broken_by": "bad"},
    "died": {"error": "illegal access", "at": "bad"},
}


@pytest.mark.parametrize("answer", FALLS.values(), ids=FALLS)
def test_a_row_goes_on_without_the_peer_that_fell(answer):
    session = a_session(Right(bad={"bad": answer}))
    found = session.timed_row(gpu_rows.ROWS["cpu"][0], ["floor", "bad", "ours"], PACE)
    assert session.worker.asked == [["floor", "bad", "ours"], ["floor", "ours"]]
    assert found["peers"] == {"floor": STEP, "ours": STEP, "bad": {"error": "illegal access"}}
    session.report["rows"].append(vars(gpu_rows.ROWS["cpu"][0]) | found)
    assert session.status() == SOME_RED


def test_a_row_without_its_floor_is_no_row():
    session = a_session(Right(bad={"floor": {"error": "silent for 60 s", "at": "floor"}}))
    found = session.timed_row(gpu_rows.ROWS["cpu"][0], ["floor", "ours"], PACE)
    assert found == {"error": "silent for 60 s"}


def wrong(change):
    """The hook with something the matter."""

    def forward(z, p):
        return change(OPERATORS["hook"].forward(z, p), z, p)

    return Operator("wrong", forward, ours=True)


def drop(y, z, p):
    """A row nobody writes."""
    out = torch.empty(y.shape, dtype=y.dtype)
    out[1:] = y[1:].detach()
    return out + 0 * y


def overwrite(y, z, p):
    # as a kernel would: autograd's version counter does not see it
    p.weight.data.add_(1)
    return y


NOISE = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda y, z, p: y, []),
        (lambda y, z, p: y * 1.02, ["y: error", "dz: error", "da: error"]),
        (drop, ["y: 72 elements were not written"]),
        (lambda y, z, p: y + 1e-6 * torch.rand(y.shape, generator=NOISE), ["y: a second call gave other bits"]),
        (overwrite, ["dz: error", "an input was overwritten"]),
        (lambda y, z, p: y.double(), ["y: torch.float64"]),
    ],
)
def test_checks_see_what_is_wrong(change, expected):
    p = projection("step 1", SHAPES["toy"], 9, torch.float32, "cpu")
    found = path_checks.problems(wrong(change), p)
    assert all(any(problem.startswith(part) for problem in found) for part in expected), found
    assert bool(found) == bool(expected)


def test_poisoned_memory_is_given_back_clean():
    before = torch.empty
    with path_checks.poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert torch.empty is before


class FakeCuda:
    """As much of torch.cuda as the clock uses; its time goes on by 2 ms for each run."""

    now = 0.0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = FakeCuda.now

        def elapsed_time(self, other):
            return other.at - self.at

    @staticmethod
    def synchronize():
        pass

    @staticmethod
    def _sleep(cycles):
        assert 0 < cycles < 1e9


def test_the_gpu_clock_divides_by_its_repeats(monkeypatch):
    monkeypatch.setattr(clock.torch, "cuda", FakeCuda)
    seen = {"a": [], "b": []}

    def step(name):
        def one(i):
            seen[name].append(i)
            FakeCuda.now += 2.0

        return one

    timed = clock.milliseconds_in_turns({name: step(name) for name in seen}, rounds=5, seconds=60, device="cuda")
    for name, row in timed.items():
        assert row.device_ms == [2.0] * 5 and len(row.host_ms) == 5
        # inputs rotate: no number twice
        assert len(set(seen[name])) == len(seen[name]) > 5
    assert not set(seen["a"]) & set(seen["b"])


def test_inputs_outgrow_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(clock.torch.cuda, "get_device_properties", lambda index: Properties)
    assert clock.input_sets(100 * 2**20, "cuda") == 2
    assert clock.input_sets(10 * 2**20, "cuda") == 11
    assert clock.input_sets(1, "cuda") == 64
    assert clock.input_sets(1, "cpu") == 2


def test_rows_are_ordered_by_importance_and_exist():
    for device, rows in gpu_rows.ROWS.items():
        assert all(row.model in SHAPES and row.level in ("projection", "layer") for row in rows)
        assert len(set(rows)) == len(rows) >= gpu_rows.QUICK[device]
    timed = {row.model for row in gpu_rows.ROWS["cuda"]}
    assert timed == {"Llama-3-8B", "Llama-3.2-1B", "Gemma-7B", "SmolLM2-135M", "Llama-2-7B"}
    assert len({row.T for row in gpu_rows.ROWS["cuda"]}) == 3
    assert gpu_rows.ROWS["cuda"][0].dtype == "bfloat16"


def test_the_decoder_layer_uses_the_projection_it_is_given():
    layer = DecoderLayer(SHAPES["toy"], 24, torch.float32, "cpu")
    p = projection("step 2", SHAPES["toy"], 1, torch.float32, "cpu")
    x, grad = layer.inputs()
    assert x.shape == grad.shape == (1, 24, 72)
    plain = layer(x, lambda z: floor(z, p))
    adapted = layer(x, lambda z: OPERATORS["ours"].forward(z, p))
    assert not torch.equal(plain, adapted)
    torch.testing.assert_close(adapted, layer(x, lambda z: OPERATORS["hook"].forward(z, p)))
    # causal: the last token reaches no other
    x2 = x.detach().clone()
    x2[:, -1] += 1
    torch.testing.assert_close(layer(x2, lambda z: floor(z, p))[:, :-1], plain[:, :-1])


def test_report_names_and_pictures(tmp_path):
    assert gpu_report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    times = {"median": 1.2, "low": 1.1, "high": 1.3}
    peers = {"floor": {"ms": 1, "host_ms": 1, "vs_floor": {"median": 1, "low": 1, "high": 1}}}
    peers |= {"ours": {"ms": 1.2, "host_ms": 1, "vs_floor": times}, "hook": {"skipped": "out of memory"}}
    row = vars(gpu_rows.ROWS["cuda"][0]) | {"peers": peers}
    found = {"evidence": gpu_report.REHEARSED, "machine": {"device": "cpu"}, "rows": [row]}
    assert "out of memory" in gpu_report.text(row) and "1.200 (1.100 to 1.300) x floor" in gpu_report.text(row)
    pytest.importorskip("matplotlib")
    assert gpu_report.picture(found, tmp_path / "gpu.png").startswith("picture")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
    assert gpu_report.picture(found | {"rows": []}, tmp_path / "none.png") == "no picture: nothing was timed"
