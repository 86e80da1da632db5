"""Everything lf.fit refuses or fails at, and that nothing is lost by it."""

import json
import os

import filelock
import pytest
import torch

import lofit_fast as lf
from lofit_fast.training.run_folder import RunFolder, held
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import (
    EXAMPLES,
    HELD_OUT,
    QUICK,
    assert_same_state,
    assert_whole,
    count_steps,
    fit,
    state_of,
)


def test_fit_refuses_empty_data(llama, tmp_path):
    before = state_of(llama)
    with pytest.raises(ValueError, match="training data is empty"):
        fit(llama, tmp_path / "run", examples=[])
    assert_same_state(llama, before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": lf.Recipe(top=13)}, "top 13 heads, but the model has 12"),
        ({"recipe": lf.Recipe(top=9, min_layer=1)}, "top 9 heads, but the model has 8 in layers from 1"),
        ({"recipe": lf.Recipe(min_layer=3)}, "min_layer is 3, but the model's last layer is 2"),
        ({"recipe": lf.Recipe(min_layer=1), "heads": [(1, 0), (0, 2)]}, r"layers below: \[\(0, 2\)\]"),
        ({"heads": [(0, 4)]}, r"does not have: \[\(0, 4\)\]"),
        ({"heads": [(3, 0)]}, r"does not have: \[\(3, 0\)\]"),
        ({"heads": []}, "empty list of heads"),
        ({"heads": [(0, 1), (0, 1)]}, "more than once"),
    ],
)
def test_fit_refuses_heads_before_training(llama, tmp_path, options, message):
    before = state_of(llama)
    with pytest.raises(ValueError, match=message):
        fit(llama, tmp_path / "run", **options)
    assert_same_state(llama, before)
    assert not (tmp_path / "run").exists()


def test_fit_refuses_a_patched_model(llama, tmp_path):
    handle = lf.patch(llama, lf.LofitConfig(offset=[(0, 0)]))
    with pytest.raises(ValueError, match="already patched"):
        fit(llama, tmp_path / "run")
    assert lf.handle_of(llama) is handle
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_fit_refuses_a_long_example(llama, tmp_path, split):
    before = state_of(llama)
    # bos + 62 + 1 + eos
    long = {"prompt": "x" * 62, "completion": "y"}
    options = {"examples": [*EXAMPLES, long]} if split == "train" else {"eval_data": [long]}
    with pytest.raises(ValueError, match=r"65 tokens long.* 64 "):
        fit(llama, tmp_path / "run", **options)
    assert_same_state(llama, before)
    assert not (tmp_path / "run").exists()


def test_fit_obeys_max_length(llama, tmp_path):
    with pytest.raises(ValueError, match=r"8 tokens long.* 7 "):
        fit(llama, tmp_path, lf.Recipe(max_length=7))
    assert lf.handle_of(llama) is None


def test_fit_refuses_an_evaluation_prompt_before_training(llama, tmp_path):
    # fits with its answer, but leaves no room for a generated one: known before the first step, so said before it
    tight = [{"prompt": "x" * 56, "completion": "y"}]
    steps = []
    with pytest.MonkeyPatch.context() as patched:
        count_steps(patched, steps)
        try:
            result = fit(llama, tmp_path, eval_data=tight)
        except ValueError:
            assert steps == []
            assert lf.handle_of(llama) is None
        else:
            assert result.metrics["tune"]["exact_match"] >= 0


def test_fit_works_with_a_tokenizer_without_padding(llama, tmp_path):
    # Llama's own has none
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    options = {"output_dir": tmp_path, "eval_data": HELD_OUT, "progress": False}
    result = lf.fit(llama, tokenizer, EXAMPLES, QUICK, **options)
    assert result.metrics["tune"]["exact_match"] >= 0


def test_fit_refuses_a_folder_below_a_file(llama, tmp_path):
    (tmp_path / "file").write_text("")
    before = state_of(llama)
    with pytest.raises(OSError, match="cannot write to output folder"):
        fit(llama, tmp_path / "file" / "run")
    assert_same_state(llama, before)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished run, for calls that leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    fit(tiny_model("llama"), folder)
    return folder


@pytest.mark.parametrize("changed", ["recipe", "data", "heads", "model"])
def test_fit_refuses_a_folder_with_another_run(llama, done, changed):
    content = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    options = {
        "recipe": {"recipe": lf.Recipe(top=3, select_epochs=1, tune_epochs=1)},
        "data": {"examples": EXAMPLES[1:]},
        "heads": {"heads": [(0, 0)]},
        "model": {},
    }[changed]
    model = tiny_model("llama", num_hidden_layers=4) if changed == "model" else llama
    before = state_of(model)
    with pytest.raises(ValueError, match=f"another {changed}"):
        fit(model, done, **options)
    assert_same_state(model, before, but=("modes", "config"))
    assert content == {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}


def test_fit_refuses_a_folder_with_a_run_of_other_weights(done):
    # the guide: another model in the same folder is refused; offsets tuned for other weights are worth nothing
    with pytest.raises(ValueError, match="another model"):
        fit(tiny_model("llama", seed=5), done)


OTHER_WEIGHTS = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.2.self_attn.v_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def test_fit_refuses_a_base_with_any_other_weight_and_shares_no_step_1_with_it(llama, tmp_path):
    shared = tmp_path / "step1"
    fit(llama, tmp_path / "run", step1_dir=shared).handle.unpatch()
    assert len(list(shared.iterdir())) == 1
    for name in OTHER_WEIGHTS:
        weight = llama.get_parameter(name)
        before = weight.detach().clone()
        with torch.no_grad():
            weight[-1] += 0.25
        with pytest.raises(ValueError, match="another model"):
            fit(llama, tmp_path / "run")
        if name == OTHER_WEIGHTS[0]:
            fit(llama, tmp_path / "other", step1_dir=shared).handle.unpatch()
            assert len(list(shared.iterdir())) == 2
        with torch.no_grad():
            weight.copy_(before)
    fit(llama, tmp_path / "run").handle.unpatch()


def test_fit_goes_on_with_a_run_of_an_earlier_release(llama, tmp_path):
    first = fit(llama, tmp_path)
    expected = [p.detach().clone() for p in first.handle.parameters()]
    first.handle.unpatch()
    # which knew the first rows of the projections, and kept no checksums, versions or lists of files
    path = tmp_path / "state.json"
    state = json.loads(path.read_text())
    base = state["identity"]["model"].pop("base")
    settings = state["identity"]["model"].pop("settings")
    for key in ("sha256", "made_with"):
        del state[key]
    path.write_text(json.dumps({**state, "stage": "tune"}))
    for file in [*tmp_path.glob("*/checkpoint-*/whole.json")]:
        file.unlink()
    again = fit(llama, tmp_path)
    assert all(a.equal(b) for a, b in zip(again.handle.parameters(), expected, strict=True))
    model = json.loads(path.read_text())["identity"]["model"]
    assert (model["base"], model["settings"]) == (base, settings)


def test_fit_refuses_a_base_of_the_same_weights_that_computes_otherwise(llama, done):
    config = llama.config
    for name, value in (("rope_parameters", {**config.rope_parameters, "rope_theta": 500.0}), ("rms_norm_eps", 0.1)):
        before = getattr(config, name)
        setattr(config, name, value)
        with pytest.raises(ValueError, match="another model"):
            fit(llama, done)
        setattr(config, name, before)
    # what says nothing of the computation, and what one of two versions of transformers has no entry for
    config.pad_token_id, config.use_cache, config.later = 5, not config.use_cache, {"dtype": torch.float32}
    config.later_still, config.initializer_range = 1, 0.5
    fit(llama, done).handle.unpatch()


def test_fit_is_refused_where_another_trains(llama, tmp_path):
    before = state_of(llama)
    with held(tmp_path), pytest.raises(BlockingIOError, match=rf"cannot train in {tmp_path}: process {os.getpid()} on"):
        fit(llama, tmp_path)
    assert_same_state(llama, before)
    fit(llama, tmp_path).handle.unpatch()


@pytest.mark.parametrize("stage", ["select", "tune"])
def test_fit_diverging(llama, tmp_path, stage):
    # a step of 1e38 in every number overflows the next forward pass
    recipe = lf.Recipe(top=3, select_epochs=2, tune_epochs=2, **{f"{stage}_lr": 1e38})
    before = state_of(llama)
    with pytest.raises(FloatingPointError, match="diverged"):
        fit(llama, tmp_path, recipe)
    assert_same_state(llama, before, but=("modes", "config"))
    assert_whole(tmp_path)
    assert RunFolder(tmp_path).stage == stage
    assert not (tmp_path / "adapter").exists()


def test_fit_diverging_leaves_mode_and_config_alone(llama, tmp_path):
    before = state_of(llama)
    with pytest.raises(FloatingPointError):
        fit(llama, tmp_path, lf.Recipe(select_lr=1e38, select_epochs=2))
    assert_same_state(llama, before)


def test_fit_on_weights_that_are_not_finite(llama, tmp_path):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    identities = [id(module) for module in llama.modules()]
    with pytest.raises(FloatingPointError, match="loss is nan"):
        fit(llama, tmp_path)
    assert [id(module) for module in llama.modules()] == identities
    assert RunFolder(tmp_path).history == []
    assert_whole(tmp_path)


def test_fit_failing_to_save_the_adapter(llama, tmp_path, monkeypatch):
    before = state_of(llama)
    save = lf.LofitHandle.save

    def failing(self, folder):
        if folder == tmp_path / "adapter":
            raise OSError("no space left on device")
        return save(self, folder)

    monkeypatch.setattr(lf.LofitHandle, "save", failing)
    with pytest.raises(OSError, match="no space left"):
        fit(llama, tmp_path)
    assert_same_state(llama, before, but=("modes", "config"))
    assert RunFolder(tmp_path).stage == "tune"


def test_fit_failing_to_let_go_of_its_folder_leaves_the_model_as_it_was(llama, tmp_path, monkeypatch):
    before = state_of(llama)
    release = filelock.FileLock.release

    def failing(self, *args, **options):
        release(self, *args, **options)
        raise OSError("the folder is gone")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="folder is gone"):
        patched.setattr(filelock.FileLock, "release", failing)
        fit(llama, tmp_path, heads=[(0, 1)])
    assert_same_state(llama, before, but=("modes", "config"))
    fit(llama, tmp_path, heads=[(0, 1)]).handle.unpatch()
