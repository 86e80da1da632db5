"""The GPU script, rehearsed from end to end on a CPU with nothing but torch and Triton, and its refusal to time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed.gpu import __main__ as script
from benchmarks.speed.gpu import gpu_report, gpu_rows, path_checks
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
    assert step_1["compiled_hook"]["skipped"] == "left out by --quick"
    assert layer["the projection alone"]["ms"] > 0 and layer["floor"]["ms"] > 0
    assert layer["fold triton"]["ms"] > 0
    assert "no picture: matplotlib is not installed" in done.stdout
    assert "python -m pytest tests/kernels/gpu" in done.stdout


def test_refuses_to_time_what_is_wrong(tmp_path):
    done, found = run(tmp_path, "--only", "pass aten", "--plant", "pass aten")
    assert done.returncode == 1
    assert "REFUSED" in done.stderr and "check pass aten: RED" in done.stdout
    assert found["rows"] == [] and "nothing was timed" in found["refused"]
    assert any("y: error" in problem for problem in found["checks"]["pass aten"]["problems"])


def test_no_time_left_is_said():
    session = script.Session(script.parse_arguments(["--device", "cpu", "--minutes", "0"]))
    session.worker = None
    session.time(["floor", "hook"])
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


ANSWERS = "for line in sys.stdin: print('noise'); print('@lofit {\"broken\": \"x\"}', flush=True)"


@pytest.mark.parametrize(
    "code, seconds, expected",
    [
        ("print('last words', file=sys.stderr, flush=True); os._exit(9)", 60, "died with status 9: last words"),
        ("input(); time.sleep(60)", 1, "no answer within 1 seconds"),
    ],
)
def test_a_worker_may_die_or_hang(code, seconds, expected):
    worker = Isolated("cpu", [sys.executable, "-c", f"import os, sys, time; {code}"])
    for _ in range(2):
        # and is started again for the next task
        assert expected in worker.run({"kind": "check"}, seconds)["error"]
    worker.close()


def test_a_worker_that_broke_its_device_is_replaced():
    worker = Isolated("cpu", [sys.executable, "-c", f"import sys\n{ANSWERS}"])
    assert worker.run({}, 20) == {"broken": "x"}
    first = worker.process
    assert worker.run({}, 20) == {"broken": "x"}
    assert first is None and worker.process is None
    worker.close()


def test_a_row_goes_on_without_the_peer_that_broke_the_device():
    session = script.Session(script.parse_arguments(["--device", "cpu"]))
    asked = []

    class Worker:
        def run(self, task, seconds):
            asked.append(task["peers"])
            if "bad" in task["peers"]:
                return {"rows": {"bad": {"error": "illegal access"}}, "broken_by": "bad"}
            return {"rows": {name: {"ms": 1.0} for name in task["peers"]}}

    session.worker = Worker()
    found = session.timed_row(gpu_rows.ROWS["cpu"][0], ["floor", "bad", "ours"])
    assert asked == [["floor", "bad", "ours"], ["floor", "ours"]]
    assert found["peers"] == {"floor": {"ms": 1.0}, "ours": {"ms": 1.0}, "bad": {"error": "illegal access"}}


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
