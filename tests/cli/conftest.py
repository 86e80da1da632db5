"""What the commands are called on: a tiny saved model, a file of examples, a finished run."""

import json
from functools import cache

import pytest
from typer.main import get_command

from tests.cli.calling import QUICK, call
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(autouse=True, scope="package")
def commands_once():
    """The tree of commands is built once: that takes longer than to refuse most calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", cache(get_command))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of 20 examples; two are held out."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"{a}=", "completion": a * 2} for a in "abcdefghijklmnopqr"]
    rows += [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a}]} for a in "st"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def run_folder(model, data, tmp_path_factory):
    """A finished run of `train`."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    call("train", "--model", model, "--data", data, "--output", folder, *QUICK, "--json")
    return folder


@pytest.fixture(autouse=True, scope="package")
def prompts_of_commands(tmp_path_factory):
    """What trainings keep of prompts stays among the tests' files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOFIT_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
