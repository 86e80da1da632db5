"""The command line on a tiny saved model: every command and its JSON."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lofit_fast as lf
from lofit_fast import tasks
from lofit_fast.cli.options import parse_top
from lofit_fast.patching import export as export_module
from tests.cli.calling import QUICK, QUICK_STEP2, as_json, call, error_of
from tests.library_versions import PICTURES

COMMANDS = ("train", "sweep", "eval", "generate", "merge", "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    text = call(command, "--help").stdout
    assert f"lofit-fast {command}" in text
    assert "Examples:" in text
    assert "--json" in text


def test_help_lists_the_commands():
    text = call("--help").stdout
    assert all(command in text for command in COMMANDS)


def test_help_in_a_process_of_its_own_loads_no_heavy_library():
    # as `python -m lofit_fast.cli --help`, and then that of a command
    code = """
import runpy
import sys
from typer.testing import CliRunner
sys.argv = ["lofit-fast", "--help"]
try:
    runpy.run_module("lofit_fast.cli", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
from lofit_fast.cli.app import app
assert CliRunner().invoke(app, ["train", "--help"]).exit_code == 0
print(sorted({"transformers", "datasets", "matplotlib", "triton"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_train_in_a_process_of_its_own(model, data, tmp_path):
    command = [sys.executable, "-m", "lofit_fast.cli", "train", "--model", model, "--data", data, "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run"), *QUICK], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout)["n_heads"] == 2
    assert "Traceback" not in done.stderr


def test_train_writes_the_run_folder(run_folder, model):
    names = {path.name for path in run_folder.iterdir()}
    assert names == {
        ".lock",
        "state.json",
        "select",
        "tune",
        "heads.json",
        "history.jsonl",
        "adapter",
        "summary.json",
        *(("heads.png", "loss.png") if PICTURES else ()),
    }
    summary = json.loads((run_folder / "summary.json").read_text())
    assert (summary["model"], summary["task"], summary["n_heads"]) == (model, "completion", 2)
    assert summary["trainable_parameters"] == 32
    assert summary["recipe"]["top"] == 2
    assert summary["recipe"]["seed"] == 42
    assert len(summary["heads"]) == 2
    assert {"accuracy_after_select", "accuracy_after_tune", "seconds", "tokens_per_s"} <= summary.keys()
    assert summary["environment"]["dtype"] == "float32"
    config = json.loads((run_folder / "adapter" / "adapter_config.json").read_text())
    assert summary["adapter_digest"] == config["tensor_digest"]


@pytest.mark.slow
def test_train_prints_a_table(model, data, tmp_path):
    result = call("train", "--model", model, "--data", data, "--output", tmp_path / "run", *QUICK)
    assert "trainable_parameters" in result.stdout
    assert "32" in result.stdout
    digest = json.loads((tmp_path / "run" / "summary.json").read_text())["adapter_digest"]
    assert f"digest {digest[:12]}" in " ".join(result.stdout.split())
    assert "adapter" in result.stdout.splitlines()[-1] or str(tmp_path) in result.stdout.replace("\n", "")


def test_train_goes_on_with_a_done_run(run_folder, model, data):
    before = (run_folder / "history.jsonl").read_text()
    summary = as_json("train", "--model", model, "--data", data, "--output", run_folder, *QUICK)
    assert (run_folder / "history.jsonl").read_text() == before
    assert summary["n_heads"] == 2


def test_train_refuses_another_run_in_the_folder(run_folder, model, data):
    arguments = ("train", "--model", model, "--data", data, "--output", run_folder, *QUICK, "--seed", "7")
    message = error_of(*arguments)
    assert "another" in message
    assert "recipe" in message


@pytest.mark.slow
def test_train_starts_over(run_folder, model, data, tmp_path):
    arguments = ("train", "--model", model, "--data", data, "--output", tmp_path, *QUICK)
    as_json(*arguments)
    summary = as_json(*arguments, "--seed", "7", "--no-resume")
    assert summary["recipe"]["seed"] == 7


# the next test reads a run's own file, which is an object
@pytest.mark.parametrize("as_object", [pytest.param(True, marks=pytest.mark.slow), False])
def test_train_on_given_heads(model, data, tmp_path, as_object):
    heads = [[2, 1], [0, 3]]
    (tmp_path / "heads.json").write_text(json.dumps({"heads": heads, "scores": None} if as_object else heads))
    summary = as_json(
        "train",
        "--model",
        model,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        *QUICK_STEP2,
        "--heads",
        tmp_path / "heads.json",
    )
    assert summary["heads"] == heads
    assert "accuracy_after_select" not in summary
    assert not (tmp_path / "run" / "heads.png").exists()


def test_train_on_all_heads(model, data, tmp_path):
    arguments = ("train", "--model", model, "--data", data, "--output", tmp_path / "run", *QUICK_STEP2)
    summary = as_json(*arguments, "--heads", "all")
    assert len(summary["heads"]) == 12
    assert "accuracy_after_select" not in summary


def test_train_on_the_heads_of_another_run(run_folder, model, data, tmp_path):
    arguments = ("train", "--model", model, "--data", data, "--output", tmp_path / "run", *QUICK_STEP2)
    summary = as_json(*arguments, "--heads", run_folder / "heads.json")
    assert summary["heads"] == json.loads((run_folder / "summary.json").read_text())["heads"]


def test_train_passes_every_option_on(model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    options = {
        "select-lr": 1e-3,
        "tune-lr": 2e-3,
        "l1": 1e-4,
        "select-epochs": 1,
        "tune-epochs": 2,
        "batch-size": 4,
        "accumulation-steps": 2,
        "max-length": 60,
        "top": 0.25,
        "min-layer": 1,
        "seed": 3,
    }
    given = [text for key, value in options.items() for text in (f"--{key}", value)]
    given += ["--train-size", 6, "--dtype", "float32", "--prefix-cache-gb", 0.5]
    summary = as_json("train", "--model", model, "--data", data, "--output", tmp_path / "run", *given)
    recipe = summary["recipe"]
    assert {key: recipe[key.replace("-", "_")] for key in options} == options
    assert summary["n_heads"] == 2
    assert len(list(tmp_path.glob("cache/prefix/*/index.json"))) == 1


def test_train_passes_the_engine_on(model, data, tmp_path, monkeypatch):
    seen = []

    def fit(*_, engine, **__):
        seen.append(engine)
        raise ValueError("enough")

    monkeypatch.setattr("lofit_fast.training.fit.fit_objective", fit)
    command = ("train", "--model", model, "--data", data, "--output", tmp_path, *QUICK)
    error_of(*command)
    error_of(*command, "--attention", "eager", "--no-compile", "--packing", "--no-group-by-length")
    assert seen[0] == seen[1] == lf.Engine()
    assert seen[2] == lf.Engine(attention="eager", compile=False, packing=True, group_by_length=False)


def test_eval_of_the_base_and_of_an_adapter(run_folder, model, data):
    for more in ((), ("--adapter", run_folder / "adapter")):
        report = as_json("eval", "--model", model, "--data", data, "--dtype", "float32", *more)
        assert report.keys() == {"task", "examples", "exact_match"}
        assert (report["task"], report["examples"]) == ("completion", 2)
        assert 0 <= report["exact_match"] <= 1


def test_eval_agrees_with_train(run_folder, model, data):
    summary = json.loads((run_folder / "summary.json").read_text())
    report = as_json(
        "eval", "--model", model, "--data", data, "--adapter", run_folder / "adapter", "--dtype", "float32"
    )
    assert report["exact_match"] == summary["accuracy_after_tune"]


def test_eval_judges_what_its_run_has_held_out(model, data, tmp_path, monkeypatch):
    call("train", "--model", model, "--data", data, "--output", tmp_path, "--seed", 7, *QUICK)
    load, seeds = tasks.load_task, []

    def noting(*arguments, seed, **options):
        seeds.append(seed)
        return load(*arguments, seed=seed, **options)

    monkeypatch.setattr(tasks, "load_task", noting)
    # of one that was killed there is no summary yet
    (tmp_path / "summary.json").unlink()
    command = ("eval", "--model", model, "--data", data, "--dtype", "float32")
    adapter = ("--adapter", tmp_path / "adapter")
    checkpoint = next((tmp_path / "tune").glob("checkpoint-*"))
    for folder in (tmp_path / "adapter", tmp_path / "select" / "adapter", checkpoint):
        as_json(*command, "--adapter", folder)
    as_json(*command)
    with pytest.warns(UserWarning, match="gives other rows to judge by than the run of .* has held out, so that it"):
        as_json(*command, *adapter, "--seed", 3)
    assert seeds == [7, 7, 7, 42, 3]


def test_eval_prints_a_table(model, data):
    assert "exact_match" in call("eval", "--model", model, "--data", data).stdout


def test_generate(run_folder, model):
    arguments = ("generate", "--model", model, "--adapter", run_folder / "adapter", "--max-new-tokens", 3)
    rows = as_json(*arguments, "-p", "a=", "-p", "b=")
    assert [row["prompt"] for row in rows] == ["a=", "b="]
    assert all(isinstance(row["answer"], str) for row in rows)
    assert as_json(*arguments, input="a=\n\nb=\n") == rows
    printed = call(*arguments, "-p", "[bold]a=").stdout
    assert printed.startswith("[bold]a=")


def test_generate_without_a_prompt(model):
    assert "no prompt" in error_of("generate", "--model", model)


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_plain_folder(run_folder, model, tmp_path, command):
    output = tmp_path / "plain"
    report = as_json(command, "--model", model, "--adapter", run_folder / "adapter", "--output", output)
    assert report["output"] == str(output)
    if command == "export":
        assert report["difference"] <= report["tolerance"]
        assert report["base_difference"] > report["difference"]
    plain = AutoModelForCausalLM.from_pretrained(output)
    assert plain.config.attention_bias is True
    # the plain folder answers as the adapter does
    generate = ("--max-new-tokens", 4, "--dtype", "float32", "-p", "a=", "-p", "hello")
    adapted = as_json("generate", "--model", model, "--adapter", run_folder / "adapter", *generate)
    assert as_json("generate", "--model", output, *generate) == adapted


# export writes it as merge does
@pytest.mark.parametrize("command", ["merge", pytest.param("export", marks=pytest.mark.slow)])
def test_a_plain_folder_that_lacks_offsets_is_noticed(run_folder, model, tmp_path, command, monkeypatch):
    whole = export_module.plain_model

    def forgetful(handle):
        plain = whole(handle)
        for layer in plain.model.layers:
            layer.self_attn.o_proj.bias.zero_()
        return plain

    monkeypatch.setattr(export_module, "plain_model", forgetful)
    message = error_of(command, "--model", model, "--adapter", run_folder / "adapter", "--output", tmp_path / "plain")
    assert "self_attn.o_proj.bias is not the merged one" in message


@pytest.mark.parametrize("command", [pytest.param("merge", marks=pytest.mark.slow), "export"])
def test_a_head_that_is_tied_by_the_config_alone(run_folder, model, tmp_path, command):
    base = AutoModelForCausalLM.from_pretrained(model)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    output = tmp_path / "plain"
    as_json(command, "--model", tmp_path / "base", "--adapter", run_folder / "adapter", "--output", output)
    plain = AutoModelForCausalLM.from_pretrained(output)
    assert plain.config.tie_word_embeddings is False
    assert torch.equal(plain.lm_head.weight, base.lm_head.weight)


@pytest.mark.parametrize(("text", "top"), [("32", 32), ("0.1", 0.1), ("1", 1), ("1.0", 1.0), ("1e-2", 0.01)])
def test_parse_top(text, top):
    parsed = parse_top(text)
    assert parsed == top
    assert type(parsed) is type(top)


def test_parse_top_of_neither():
    with pytest.raises(ValueError, match=r"count like 32 or a fraction like 0\.1, got 'ten'"):
        parse_top("ten")


@pytest.fixture
def grid(model, data, tmp_path):
    """A sweep of two runs."""
    path = tmp_path / "grid.toml"
    path.write_text(
        f"""
        [base]
        model = {model!r}
        data = {data!r}
        dtype = "float32"
        device = "cpu"
        select_epochs = 1
        tune_epochs = 1
        [grid]
        top = [2, 3]
        """
    )
    return path


def test_sweep_lists_its_runs(grid, tmp_path):
    found = as_json("sweep", grid, "--output", tmp_path / "sweep", "--dry-run")
    assert [run["name"] for run in found["runs"]] == ["top=2", "top=3"]
    assert found["runs"][1]["recipe"]["top"] == 3
    assert not (tmp_path / "sweep").exists()
    assert "top=3" in call("sweep", grid, "--output", tmp_path / "sweep", "--dry-run").stdout


@pytest.mark.slow
def test_sweep_runs_them_and_fails_at_the_end(grid, tmp_path):
    assert [run["status"] for run in as_json("sweep", grid, "--output", tmp_path / "sweep")["runs"]] == ["done"] * 2
    grid.write_text(grid.read_text().replace("[2, 3]", "[99, 3]"))
    result = call("sweep", grid, "--output", tmp_path / "sweep", code=1)
    assert "done" in result.stdout
    assert "error: 1 of 2 runs failed: top=99" in result.stderr
    grid.write_text(grid.read_text().replace("top =", "tpo ="))
    assert "did you mean top?" in error_of("sweep", grid, "--output", tmp_path / "sweep")


def test_truthfulqa_is_trained_with_dpo_and_judged_by_choices(model, tmp_path):
    pytest.importorskip("trl")
    from tests.tasks.test_truthfulqa import TRAIN, write

    about = ("--model", model, "--task", "truthfulqa", "--data", write(tmp_path, validation=TRAIN[:3]))
    run = tmp_path / "run"
    summary = as_json("train", *about, "--train-size", "4", "--beta", "0.2", "--output", run, *QUICK)
    assert json.loads((run / "state.json").read_text())["identity"]["beta"] == 0.2
    assert (run / "loss.png").is_file() == PICTURES
    report = as_json("eval", *about, "--adapter", run / "adapter", "--dtype", "float32", "--device", "cpu")
    assert (report["task"], report["examples"]) == ("truthfulqa", 3)
    assert {key: report[key] for key in ("mc1", "mc2")} == {key: summary[key] for key in ("mc1", "mc2")}
    assert 0 < report["mc2"] < 1


@pytest.fixture
def gguf_model(tmp_path_factory):
    """A GGUF file of the tiny Llama that `run_folder`'s adapter is for."""
    pytest.importorskip("gguf")
    from tests.tiny_gguf import write_tiny_gguf
    from tests.tiny_models import tiny_model

    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "base.gguf", tiny_model("llama"))


def test_exports_for_servers(run_folder, model, tmp_path):
    adapted = ("--adapter", run_folder / "adapter")
    report = as_json("export", "--model", model, *adapted, "--for", "vllm", "--output", tmp_path / "served")
    assert report["for"] == "vllm"
    assert report["difference"] <= report["tolerance"]


def test_exports_for_peft(run_folder, model, tmp_path):
    pytest.importorskip("peft")
    given = ("--adapter", run_folder / "adapter", "--for", "peft", "--peft-method", "lora")
    report = as_json("export", "--model", model, *given, "--output", tmp_path / "lora")
    assert report["difference"] <= report["tolerance"] < report["base_difference"]
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


def test_exports_for_llama_cpp(run_folder, model, gguf_model, tmp_path):
    adapted = ("--adapter", run_folder / "adapter")
    # the file that the model is loaded from is the template, and one that is given
    for name, more in ((gguf_model, ()), (model, ("--template", gguf_model))):
        output = tmp_path / f"gguf{len(more)}"
        report = as_json("export", "--model", name, *adapted, "--for", "llama.cpp", *more, "--output", output)
        assert report == {"output": str(output), "for": "llama.cpp"}
        assert (output / "model.gguf").is_file()
    assert (tmp_path / "gguf0" / "model.gguf").read_bytes() == (tmp_path / "gguf2" / "model.gguf").read_bytes()


def test_exports_that_are_refused(run_folder, model, tmp_path):
    calling = ("export", "--model", model, "--adapter", run_folder / "adapter", "--output", tmp_path / "out")
    assert "--for to be one of transformers, vllm, sglang, tgi, llama.cpp, peft" in error_of(
        *calling, "--for", "ollama"
    )
    assert "gguf_type is for target='llama.cpp'" in error_of(*calling, "--for", "tgi", "--gguf-type", "f16")
    assert not (tmp_path / "out").exists()


def test_templates_that_are_not_there(run_folder, model, tmp_path):
    pytest.importorskip("gguf")
    calling = ("export", "--model", model, "--adapter", run_folder / "adapter", "--for", "llama.cpp")
    calling = (*calling, "--output", tmp_path / "out")
    assert "no GGUF file of the base is known" in error_of(*calling)
    assert "no such GGUF file" in error_of(*calling, "--template", tmp_path / "no.gguf")
    assert not (tmp_path / "out").exists()
