"""The files of `examples/accelerate` are what accelerate reads, and launch what they say."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lofit_fast.patching.storage import read_adapter
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
PAGE = (ROOT / "docs" / "scaling_out.md").read_text()


def parsed(path):
    """The arguments of accelerate's launcher with this file, as it fills them in, and the environment it would set."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "lofit_fast.cli", "train"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    return arguments, defaults, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_is_one_of_accelerate_and_on_the_page(path):
    from accelerate.commands.config.config_args import load_config_from_file

    before = dict(os.environ)
    config = load_config_from_file(str(path))
    arguments, defaults, _ = parsed(path)
    assert defaults.to_dict() == config.to_dict()
    assert arguments.num_processes == config.num_processes > 1
    # the launcher's own variables are its children's
    assert dict(os.environ) == before
    assert f"examples/accelerate/{path.name}" in PAGE


def test_there_are_files():
    assert {path.stem for path in CONFIGS} >= {"ddp", "fsdp2"}


def test_fsdp_is_of_version_2_and_whole_layers():
    _, _, environment = parsed(ROOT / "examples" / "accelerate" / "fsdp2.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_ACTIVATION_CHECKPOINTING"] == "false"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is told to compute on the CPU")
def test_the_file_for_data_parallel_trains_what_one_process_does(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}=", "completion": a * 2} for a in "abcdefghijkl"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--dtype", "float32"]
    train += ["--device", "cpu", "--top", "2", "--batch-size", "4", "--select-epochs", "1", "--tune-epochs", "2"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "examples" / "accelerate" / "ddp.yaml"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch += ["--num_processes", "2", "--main_process_port", port, "-m", "lofit_fast.cli"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    found = {}
    for name, how in (("one", ["-m", "lofit_fast.cli"]), ("two", launch)):
        command = [sys.executable, *how, *train, "--output", tmp_path / name]
        done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = read_adapter(tmp_path / name / "adapter").tensors
    assert found["one"].keys() == found["two"].keys()
    for key, value in found["one"].items():
        assert torch.allclose(found["two"][key], value, rtol=0, atol=1e-5)
