"""`plan` and `autotune`: what they say of models, devices and adapters, and what they leave behind."""

import os
import threading
import time

import pytest
import torch
from transformers import AutoConfig

import lofit_fast as lf
from lofit_fast.cli.device_plan_report import readable
from lofit_fast.cli.options import parse_heads
from lofit_fast.locks import alone
from lofit_fast.models import op_paths
from lofit_fast.models.op_paths import Layer, adapter_heads, layers_of, plan_layers, spread_heads
from lofit_kernels import answers, dispatch, roofline
from lofit_kernels.dispatch import SMALL_SCALES, answers_for, plan, plan_for, use_answers
from tests.cli.calling import as_json, call, error_of
from tests.tiny_families import tiny_family
from tests.tiny_models import HEAD_DIM, HEADS, HIDDEN, LAYERS, tiny_model

# what step 1 takes in bfloat16 where nothing was measured
DEFAULT = plan(has_scale=True, many_heads=True, dtype=torch.bfloat16, device_type="cuda")
LLAMA = [Layer(layer, HEADS, HEAD_DIM, HIDDEN) for layer in range(LAYERS)]
COMMANDS = (("plan",), ("autotune",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Llama's config and no weights."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").config.save_pretrained(path)
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and nothing measured once the test is over."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path))
    yield tmp_path
    use_answers("cpu", {})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples(command):
    text = call(*command, "--help").stdout
    assert f"lofit-fast {' '.join(command)}" in text
    assert "Examples:" in text
    assert "--json" in text


def test_layers_of_a_family(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    head_dim = model.model.layers[0].self_attn.o_proj.in_features // HEADS
    assert layers_of(str(tmp_path)) == [Layer(layer, HEADS, head_dim, HIDDEN) for layer in range(LAYERS)]


@pytest.mark.parametrize("family", ["llava", "gemma4_unified_text"])
def test_an_adapter_of_any_family_fits_its_own_layers(family, tmp_path):
    model = tiny_family(family)
    model.config.save_pretrained(tmp_path / "model")
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    handle.save(tmp_path / "adapter")
    layers = layers_of(str(tmp_path / "model"))
    assert adapter_heads(tmp_path / "adapter", layers)[1] == [p.n_heads for p in handle.projections]


def test_layers_of_reads_no_weights(folder):
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert layers_of(str(folder)) == LLAMA


def test_layers_of_a_model_without_projections(tmp_path):
    AutoConfig.for_model(
        "mamba2", num_hidden_layers=2, hidden_size=8, num_heads=2, head_dim=8, vocab_size=9
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not supported"):
        layers_of(str(tmp_path))


@pytest.mark.parametrize(
    ("top", "counts"), [(None, [0, 0, 0]), ("all", [4, 4, 4]), (1, [0, 0, 1]), (7, [2, 2, 3]), (0.5, [2, 2, 2])]
)
def test_spread_heads(top, counts):
    assert spread_heads(top, LLAMA) == counts


def test_spread_heads_over_layers_of_different_heads():
    layers = [Layer(0, 2, 8, 16), Layer(1, 6, 8, 16)]
    assert spread_heads(4, layers) == [1, 3]
    assert spread_heads("all", layers) == [2, 6]


@pytest.mark.parametrize("top", [0, 13, 0.0, 1.5, -1])
def test_spread_heads_refuses(top):
    with pytest.raises(ValueError, match="a count up to 12 or a fraction"):
        spread_heads(top, LLAMA)


def test_parse_heads():
    assert [parse_heads(text) for text in (None, "all", "32", "0.1")] == [None, "all", 32, 0.1]
    with pytest.raises(ValueError, match="'some'"):
        parse_heads("some")


def test_plan_layers_predicts_what_the_roofline_does():
    rows = plan_layers(LLAMA, [4, 0, 0], [0, 2, 0], tokens=4096, dtype=torch.bfloat16, device="H100")
    by_default = (DEFAULT.forward, DEFAULT.backward)
    assert [(row["forward"], row["backward"]) for row in rows] == [by_default, ("fold", "fold"), ("base", "base")]
    assert rows[0]["small_scales"] == SMALL_SCALES[DEFAULT.form, torch.bfloat16]
    shape = roofline.Shape(4096, HIDDEN, HEADS, HEAD_DIM, n_scale=4)
    assert rows[0]["ratio"] == roofline.predict(by_default, shape, roofline.DEVICES["H100"]).ratio
    assert rows[0]["evidence"] == rows[1]["evidence"] == op_paths.EVIDENCE
    assert "ratio" not in rows[2]


def test_plan_layers_in_float32_takes_the_pass():
    (row,) = plan_layers(LLAMA[:1], [4], [0], tokens=64, dtype=torch.float32, device="A100")
    assert (row["forward"], row["small_scales"]) == ("pass", "every |a| acts")
    assert row["ratio"] > 1


def test_plan_layers_of_a_device_without_kernels_are_of_aten(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(op_paths, "best_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(op_paths.answers, "device_name", lambda device: "an older device")
    use_answers("an older device", {})
    for refusal, backend in ((None, "triton"), ("no Triton tiles", "aten")):
        monkeypatch.setattr(op_paths, "unserved", lambda device, refusal=refusal: refusal)
        rows = plan_layers(LLAMA, [4, 1, 0], [0, 0, 2], tokens=64, dtype=torch.bfloat16)
        assert [row["backend"] for row in rows] == 3 * [backend]


def test_plan_layers_of_an_unknown_device():
    with pytest.raises(ValueError, match="unknown device 'TPU': expected 'present' or one of A100"):
        plan_layers(LLAMA, [1] * 3, [0] * 3, tokens=1, dtype=torch.bfloat16, device="TPU")


def test_plan_command(folder):
    report = as_json("plan", "--model", folder, "--tokens", 512, "--device", "H200")
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2]
    assert {row["forward"] for row in report["layers"]} == {DEFAULT.forward}
    assert report["dtype"] == "torch.bfloat16"
    text = call("plan", "--model", folder, "--tokens", 512, "--device", "H200").stdout
    assert "0-2" in text
    assert op_paths.EVIDENCE in " ".join(text.split())
    report = as_json(
        "plan", "--model", folder, "--tokens", 512, "--scale", "6", "--offset", "0.5", "--dtype", "float32"
    )
    assert [(row["scaled"], row["shifted"]) for row in report["layers"]] == [(2, 2)] * 3


def test_plan_command_for_an_adapter(folder, tmp_path):
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale=[(0, 1)], offset=[(0, 1), (2, 0), (2, 3)]))
    handle.save(tmp_path)
    report = as_json("plan", "--model", folder, "--tokens", 64, "--adapter", tmp_path)
    assert [(row["scaled"], row["shifted"]) for row in report["layers"]] == [(1, 1), (0, 0), (0, 2)]
    assert "for another model" in error_of("plan", "--model", "Llama-3-8B", "--tokens", 64, "--adapter", tmp_path)
    arguments = ("plan", "--model", folder, "--tokens", 64, "--adapter", tmp_path, "--scale", "all")
    assert "got both" in error_of(*arguments)
    answers = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 1)], positions="answer"))
    answers.save(tmp_path / "answers")
    arguments = ("plan", "--model", folder, "--tokens", 64, "--adapter", tmp_path / "answers")
    assert "acts on answers alone" in error_of(*arguments)


def test_plan_command_refuses(folder):
    assert "unknown device 'T4'" in error_of("plan", "--model", folder, "--tokens", 8, "--device", "T4")
    assert "'most'" in error_of("plan", "--model", folder, "--tokens", 8, "--scale", "most")
    assert "no model folder" in error_of("plan", "--model", "./nowhere", "--tokens", 8)


def test_autotune_command_leaves_answers_that_are_used(folder, cache):
    arguments = ("autotune", "--model", folder, "--tokens", 20, "--device", "cpu", "--dtype", "float32", "--rounds", 1)
    report = as_json(*arguments, "--heads", "all", "--heads", "1")
    assert report["file"] == str(cache / "autotune" / "cpu.json")
    assert [row["case"]["share"] for row in report["answers"]] == [1.0, 0.25]
    assert report["answers"][0]["ratio_to_default"].keys() == {"pass/aten/vendor", "delta/aten/vendor"}
    kept = answers.read_answers("cpu")
    assert kept == answers_for("cpu")
    assert {str(path) for path in kept.values()} == {row["path"] for row in report["answers"]}
    # another run adds to them
    as_json(*arguments, "--tokens", 100, "--backend", "aten")
    assert {case.tokens for case in answers.read_answers("cpu")} == {16, 64}
    # and the op and the plan follow what is there
    case = answers.key(torch.float32, HIDDEN, HEADS * HEAD_DIM, HEAD_DIM, HEADS, 20)
    use_answers("cpu", {case: answers.Path("delta", "aten", "vendor")})
    weight, scale = torch.empty(HIDDEN, HEADS * HEAD_DIM), torch.empty(HEADS, HEAD_DIM)
    assert plan_for(30, weight, scale, "auto", "auto", "auto").form == "delta"
    rows = plan_layers(LLAMA, [HEADS] * 3, [0] * 3, tokens=30, dtype=torch.float32)
    if not torch.cuda.is_available():
        assert {row["forward"] for row in rows} == {"delta"}
        assert "measured" in rows[0]["why"]


@pytest.mark.slow
def test_autotune_command_measures_triton_paths(folder, cache):
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
    arguments = ("autotune", "--model", folder, "--tokens", 8, "--dtype", "float16", "--rounds", 1, "--device", "cpu")
    (row,) = as_json(*arguments, "--backend", "aten", "--backend", "triton")["answers"]
    if not torch.cuda.is_available():
        assert row["refused"] == {}
        assert {"delta/triton/fused", "delta/triton/vendor"} <= row["milliseconds"].keys()


def test_autotune_command_prints_a_table(folder, cache):
    text = call(
        "autotune", "--model", folder, "--tokens", 8, "--device", "cpu", "--dtype", "float32", "--rounds", 1
    ).stdout
    assert "chosen" in text
    assert "cpu.json" in text.replace("\n", "")


def test_a_second_autotune_waits_and_adds_its_answers(folder, cache, caplog):
    arguments = ("autotune", "--model", folder, "--device", "cpu", "--dtype", "float32", "--rounds", 1, "--tokens")
    as_json(*arguments, 20)
    inside = threading.Event()

    def hold():
        with alone(cache / "autotune" / "cpu.json.lock", "measure"):
            inside.set()
            # until the other one waits, however long it takes to come that far
            ends = time.monotonic() + 60
            while "waiting to measure" not in caplog.text and time.monotonic() < ends:
                time.sleep(0.01)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    as_json(*arguments, 100)
    thread.join()
    assert f"waiting to measure on cpu: process {os.getpid()} on host" in caplog.text
    assert {case.tokens for case in answers.read_answers("cpu")} == {16, 64}


def test_autotune_command_refuses(folder, cache):
    assert "unknown backend ['cutlass']" in error_of("autotune", "--model", folder, "--backend", "cutlass")
    assert list(cache.iterdir()) == []


def test_a_broken_config_and_no_number_of_heads(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    assert f"{tmp_path} cannot be loaded: " in error_of("plan", "--model", tmp_path, "--tokens", "4")
    for count in ("nan", "inf"):
        message = error_of("plan", "--model", "SmolLM2-135M", "--tokens", "4", "--scale", count)
        assert f"a fraction in (0, 1], got {count}" in message


def test_plan_for_several_devices(folder):
    report = as_json("plan", "--model", folder, "--devices", 2, "--mode", "fsdp", "--offset", "2")
    assert (report["tokens"], report["dtype"], report["mode"]) == (4096, "torch.bfloat16", "fsdp")
    assert report["bytes_per_device"] == sum(item["bytes"] for item in report["memory"])
    assert {item["evidence"] for item in report["memory"]} == {"exact count", "formula"}
    assert "No GPU has run this." in report["notes"][-1]
    assert "fits" not in report
    for memory, word in ((80, "fits into 80 GB"), (1e-6, "does not fit into 1e-06 GB")):
        arguments = ("plan", "--model", folder, "--devices", 2, "--device-memory", memory)
        assert as_json(*arguments)["fits"] is (memory == 80)
        text = " ".join(call(*arguments).stdout.split())
        assert word in text
        assert "ddp on 2 devices" in text


def test_plan_for_several_devices_refuses(folder):
    assert "got no --devices" in error_of("plan", "--model", folder, "--mode", "fsdp")
    assert "got no --devices" in error_of("plan", "--model", folder, "--device-memory", 80)
    several = ("plan", "--model", folder, "--devices", 2)
    assert "unknown mode 'zero3'" in error_of(*several, "--mode", "zero3")
    assert "got both: the latter is 'H100'" in error_of(*several, "--device", "H100")
    assert "expected GB above 0" in error_of(*several, "--device-memory", "nan")


def test_bytes_are_read_in_units():
    assert [readable(size) for size in (0, 999, 1000, 2 * 10**6, 141 * 10**9, 10**12)] == [
        "0 B",
        "999 B",
        "1 KB",
        "2 MB",
        "141 GB",
        "1 TB",
    ]
