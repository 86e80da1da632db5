"""What the commands say to bad input: one clear line, and nothing written."""

import json
import re
import shutil
from typing import get_type_hints

import pytest

import lofit_fast as lf
from lofit_fast.cli.app import app
from tests.cli.calling import QUICK, call, error_of
from tests.tiny_models import tiny_model


def test_a_missing_data_file(model, tmp_path):
    message = error_of("train", "--model", model, "--data", tmp_path / "no.jsonl", "--output", tmp_path / "run", *QUICK)
    assert f"{tmp_path}/no.jsonl: no such file" in message
    assert not (tmp_path / "run").exists()


def test_an_error_keeps_its_brackets(model, tmp_path):
    # rich would take them for markup, and a closing tag that was never opened for an error of its own
    for name in ("[red]no.jsonl", "[/red]no.jsonl"):
        message = error_of("eval", "--model", model, "--data", tmp_path / name)
        assert f"{name}: no such file" in message


def test_an_unknown_task(model, tmp_path):
    message = error_of("train", "--model", model, "--task", "clutr", "--output", tmp_path / "run")
    assert "'clutr'" in message
    assert "clutrr, completion, kinship" in message


@pytest.mark.parametrize("top", ["many", "0", "1.5", "-1", "nan"])
def test_a_bad_top(model, data, tmp_path, top):
    message = error_of("train", "--model", model, "--data", data, "--output", tmp_path / "run", f"--top={top}")
    assert "top" in message
    assert top in message
    assert not (tmp_path / "run").exists()


def test_too_many_heads(model, data, tmp_path):
    message = error_of("train", "--model", model, "--data", data, "--output", tmp_path / "run", *QUICK, "--top", 13)
    assert "13" in message
    assert "12" in message


@pytest.mark.parametrize("content", ["{}", "7", '{"heads": 3}', "[[0, 1], [0", '{"heads": [0]}', ""])
def test_bad_heads(model, data, tmp_path, content):
    (tmp_path / "heads.json").write_text(content)
    arguments = ("train", "--model", model, "--data", data, "--output", tmp_path / "run", "--heads")
    message = error_of(*arguments, tmp_path / "heads.json")
    assert "heads.json holds no heads" in message
    assert "[[layer, head], ...]" in message


def test_missing_heads(model, data, tmp_path):
    arguments = ("train", "--model", model, "--data", data, "--output", tmp_path / "run", "--heads")
    assert "no.json" in error_of(*arguments, tmp_path / "no.json")


@pytest.mark.parametrize("command", ["eval", "generate", "merge", "export"])
def test_a_missing_adapter(model, data, tmp_path, command):
    more = {"eval": ("--data", data), "generate": ("-p", "a")}.get(command, ("--output", tmp_path / "out"))
    message = error_of(command, "--model", model, "--adapter", tmp_path / "no", *more)
    assert f"{tmp_path}/no is no adapter folder" in message
    assert not (tmp_path / "out").exists()


def test_a_foreign_adapter(model, tmp_path):
    handle = lf.patch(tiny_model("llama", num_hidden_layers=2), lf.LofitConfig(offset=[(0, 0)]))
    handle.save(tmp_path / "adapter")
    message = error_of("generate", "--model", model, "--adapter", tmp_path / "adapter", "-p", "a")
    assert "for another model" in message
    assert "layers=2" in message
    assert "layers=3" in message


def test_an_adapter_of_another_kind(model, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    message = error_of("generate", "--model", model, "--adapter", tmp_path, "-p", "a")
    assert "not a LoFiT adapter" in message
    assert "'LORA'" in message


def test_a_missing_model(data, tmp_path):
    assert "no model folder" in error_of("eval", "--model", tmp_path / "none", "--data", data)


def test_an_unknown_dtype(model, data):
    assert "unknown dtype 'float8'" in error_of("eval", "--model", model, "--data", data, "--dtype", "float8")


def test_an_unknown_device(model, data):
    assert "warp" in error_of("eval", "--model", model, "--data", data, "--device", "warp")


def test_an_output_below_a_file(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ("train", "--model", model, "--data", data, *QUICK, "--output")
    assert "cannot write to output folder" in error_of(*arguments, tmp_path / "file" / "run")


# every option that counts something -> the least it takes
COUNTS = {
    "eval": {"--batch-size": 1},
    "generate": {"--max-new-tokens": 1},
    "train": {
        **{f"--{name}": 1 for name in ("train-size", "batch-size", "accumulation-steps", "max-length")},
        **{f"--{name}": 0 for name in ("select-epochs", "tune-epochs", "min-layer")},
        "--select-examples": 1,
    },
    "select": {
        **{f"--{name}": 1 for name in ("train-size", "batch-size", "select-examples")},
        **{f"--{name}": 0 for name in ("select-epochs", "min-layer")},
    },
    "sweep": {"--jobs": 1, "--together": 1},
    "plan": {"--tokens": 1, "--devices": 1},
    "heads": {"--tokens": 1, "--pictures": 1},
    "autotune": {"--tokens": 1, "--rounds": 1},
    "serve": {"--port": 0, "--max-new-tokens": 1, "--queue": 0},
}
NEEDED = {
    "sweep": ("grid.toml",),
    "autotune": (),
    "plan": ("--model", "Llama-3-8B"),
    "heads": ("--model", "no-such-model", "--adapter", "none"),
}


@pytest.mark.parametrize("command", COUNTS)
def test_a_count_below_the_least_is_refused_before_anything_is_read(command):
    for option, least in COUNTS[command].items():
        # of a model that is not there, which nobody gets to see
        needed = NEEDED.get(command, ("--model", "no-such-model"))
        message = error_of(command, *needed, f"{option}={least - 1}")
        assert message == f"{option}: got {least - 1}, expected a whole number from {least}"


def test_every_option_that_takes_a_whole_number_has_a_least():
    for command in app.registered_commands:
        hints = get_type_hints(command.callback.__wrapped__, include_extras=True)
        whole = {name for name, hint in hints.items() if re.search(r"\bint\b", str(hint))} - {"seed"}
        marked = {name for name, hint in hints.items() if "AtLeast(" in str(hint)}
        assert whole == marked == {option[2:].replace("-", "_") for option in COUNTS.get(command.callback.__name__, ())}


def _with(config, **changes):
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


# what is wrong with a model folder -> how it came to be so
BROKEN = {
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(b"xx"),
    "cut tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "cut config": lambda folder: (folder / "config.json").write_text("{"),
    "a size of another type": lambda folder: _with(folder / "config.json", hidden_size="x"),
    "sizes that do not fit each other": lambda folder: _with(folder / "config.json", hidden_size=7),
    "weights of another size": lambda folder: _with(folder / "config.json", vocab_size=5),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_folder(model, data, tmp_path, name):
    folder = shutil.copytree(model, tmp_path / "broken")
    BROKEN[name](folder)
    assert str(folder) in error_of("eval", "--model", folder, "--data", data)


def test_a_broken_gguf_file(data, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUFxxxx")
    assert f"{tmp_path}/a.gguf cannot be loaded" in error_of("eval", "--model", tmp_path / "a.gguf", "--data", data)


@pytest.mark.parametrize(("name", "value"), [("seed", "x"), ("seed", None), ("init_std", "x"), ("init_std", None)])
def test_an_adapter_with_a_setting_of_another_type(model, tmp_path, name, value):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 0)]))
    handle.save(tmp_path / "adapter")
    _with(tmp_path / "adapter" / "adapter_config.json", **{name: value})
    message = error_of("generate", "--model", model, "--adapter", tmp_path / "adapter", "-p", "a")
    assert "does not describe an adapter" in message
    assert name in message
    assert repr(value) in message


def test_prompts_that_are_no_text(model):
    result = call("generate", "--model", model, input=b"\xff\xfe\n", code=1)
    assert "error: standard input: expected UTF-8 text" in result.stderr


def test_half_a_character(model):
    assert "half a character" in error_of("generate", "--model", model, "-p", "a \ud83d", "--max-new-tokens", "2")
