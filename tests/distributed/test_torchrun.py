"""The command line under torchrun and accelerate launch themselves, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.same_runs import assert_same_logits, assert_same_run
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

# launchers and libraries start anew for each process
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--multi_gpu", "--num_processes"),
)
MODULE, ONE = ("-m", "lofit_fast.cli"), (sys.executable, "-m", "lofit_fast.cli")
ON_CPU = ("--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(cache, tmp_path):
    """Run a command line from anywhere: (exit code, what it has printed, what it has said beside)."""

    def run(*line, stdin=""):
        here = Path(__file__).parents[2]
        places = os.pathsep.join((str(here / "kernels"), str(here)))
        env = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "LOFIT_FAST_CACHE": str(cache)}
        how = {"input": stdin, "capture_output": True, "text": True, "timeout": 800, "env": env, "cwd": tmp_path}
        done = subprocess.run([str(part) for part in line], **how)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("processes", [2, 3])
def test_train_on_a_tiny_model(command, model, data, tmp_path, processes):
    asked = ("train", "--model", model, "--data", data, "--top", "3", "--batch-size", "6", *ON_CPU, "--json")
    asked += ("--select-epochs", "2", "--tune-epochs", "2")
    code, out, err = command(*TORCHRUN, processes, *MODULE, *asked, "-o", tmp_path / "several")
    assert code == 0 and json.loads(out)["n_heads"] == 3, err
    assert command(*ONE, *asked, "-o", tmp_path / "one")[0] == 0
    assert_same_run(tmp_path / "several", tmp_path / "one")
    assert_same_logits(model, tmp_path / "several", tmp_path / "one")


def test_train_a_model_that_processes_hold_together(command, data, tmp_path):
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers without tp_plan")
    folder = tmp_path / "model"
    tiny_model("gemma").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    asked = ("train", "--model", folder, "--data", data, "--top", "3", "--batch-size", "5", *ON_CPU, "--json")
    asked += ("--select-epochs", "2", "--tune-epochs", "2")
    code, out, err = command(*TORCHRUN, 2, *MODULE, *asked, "--tensor-parallel", "-o", tmp_path / "two")
    assert code == 0 and json.loads(out)["n_heads"] == 3, err
    assert command(*ONE, *asked, "-o", tmp_path / "one")[0] == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert_same_logits(str(folder), tmp_path / "two", tmp_path / "one")


@pytest.mark.real
@pytest.mark.parametrize("processes", [2, 3])
def test_train_on_smollm2(command, data, tmp_path, processes):
    asked = ("train", "--model", "smollm2", "--data", data, "--top", "0.1", "--batch-size", "6", *ON_CPU, "--json")
    asked += ("--select-epochs", "1", "--tune-epochs", "1")
    code, out, err = command(*TORCHRUN, processes, *MODULE, *asked, "-o", tmp_path / "several")
    assert code == 0 and json.loads(out)["n_heads"] == 27, err
    assert command(*ONE, *asked, "-o", tmp_path / "one")[0] == 0
    assert_same_run(tmp_path / "several", tmp_path / "one")
    assert_same_logits("smollm2", tmp_path / "several", tmp_path / "one")


@pytest.mark.parametrize("launcher", [(*TORCHRUN, 2, *MODULE), (*ACCELERATE, 2, *MODULE), (*ACCELERATE, 2, "script")])
def test_answers_under_each_launcher(command, model, tmp_path, launcher):
    if launcher[-1] == "script":
        script = tmp_path / "lofit-fast.py"
        script.write_text("from lofit_fast.cli import main\n\nmain()\n")
        launcher = (*launcher[:-1], script)
    asked = ("generate", "--model", model, "--max-new-tokens", "4", *ON_CPU)
    code, out, err = command(*launcher, *asked, stdin="ab\ncd=\n")
    assert (code, out) == (0, command(*ONE, *asked, stdin="ab\ncd=\n")[1]), err


def test_an_error_ends_all_with_one_line(command, tmp_path):
    code, out, err = command(*TORCHRUN, 2, *MODULE, "eval", "--model", tmp_path / "none", "--data", "x")
    assert code == 1 and not out and err.count("is no model folder: config.json not found") == 1
    # torchrun's own report of both
    assert err.count("exitcode  : 1") >= 1


def test_two_launches_cannot_train_in_one_folder(command, model, data, tmp_path):
    from lofit_fast.training.run_folder import held

    (tmp_path / "run").mkdir()
    asked = ("train", "--model", model, "--data", data, "--top", "3", *ON_CPU, "-o", tmp_path / "run")
    with held(tmp_path / "run"):
        code, out, err = command(*TORCHRUN, 2, *MODULE, *asked)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 1 and not out and len(lines) == 1 and "does so now" in lines[0], err
