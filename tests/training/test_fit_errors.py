"""Everything lf.fit refuses or fails at, and that nothing is lost by it."""

import pytest
import torch

import lofit_fast as lf
from lofit_fast.training.run_folder import RunFolder
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


@pytest.mark.parametrize("changed", ["recipe", "data", "heads", "model"])
def test_fit_refuses_a_folder_with_another_run(llama, tmp_path, changed):
    fit(llama, tmp_path).handle.unpatch()
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = {
        "recipe": {"recipe": lf.Recipe(top=3, select_epochs=1, tune_epochs=1)},
        "data": {"examples": EXAMPLES[1:]},
        "heads": {"heads": [(0, 0)]},
        "model": {},
    }[changed]
    model = tiny_model("llama", num_hidden_layers=4) if changed == "model" else llama
    before = state_of(model)
    with pytest.raises(ValueError, match=f"another {changed}"):
        fit(model, tmp_path, **options)
    assert_same_state(model, before, but=("modes", "config"))
    assert content == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_fit_refuses_a_folder_with_a_run_of_other_weights(llama, tmp_path):
    # the guide: another model in the same folder is refused; offsets tuned for other weights are worth nothing
    fit(llama, tmp_path).handle.unpatch()
    with pytest.raises(ValueError, match="another model"):
        fit(tiny_model("llama", seed=5), tmp_path)


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
