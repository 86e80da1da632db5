"""lf.fit on a tiny model: both steps, what it leaves on disk, interruptions, and everything it refuses."""

import copy
import json

import pytest
import torch
from transformers import LlamaForCausalLM

import lofit_fast as lf
from lofit_fast.adapter import read_adapter
from lofit_fast.heads import select_heads
from lofit_fast.training import recipe as recipe_module
from lofit_fast.training.run import RunFolder
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

# what a clock says, and no seed repeats
CLOCKED = {"seconds", "tokens_per_s", "examples_per_s"}
EXAMPLES = [{"prompt": f"{a}+{b}=", "completion": b + a} for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]
HELD_OUT = [{"prompt": "a+x=", "completion": "xa"}, {"prompt": "b+w=", "completion": "wb"}]
RECIPE = lf.Recipe(top=3, select_epochs=3, tune_epochs=3)
QUICK = lf.Recipe(top=2, select_epochs=1, tune_epochs=1)


def fit(model, folder, recipe=QUICK, examples=EXAMPLES, **options):
    return lf.fit(model, tiny_tokenizer(), examples, recipe, output_dir=folder, progress=False, **options)


def state_of(model):
    """Everything about a model that a refused or failed fit must leave alone."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),
    }


def assert_same_state(model, before, *, but=()):
    after = state_of(model)
    values = before["values"]
    assert after["values"].keys() == values.keys()
    assert all(value.equal(values[name]) for name, value in after["values"].items())
    changed = [key for key in ("modules", "modes", "parameters", "config") if after[key] != before[key]]
    assert set(changed) <= set(but)


def assert_whole(folder):
    """No scratch folders, and every JSON file parses."""
    assert not list(folder.rglob(".lofit-*"))
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())


def vectors(handle):
    return [parameter.detach().clone() for parameter in handle.parameters()]


def assert_equal_vectors(got, expected):
    assert len(got) == len(expected)
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))


def test_fit_end_to_end(llama, tmp_path):
    base = {name: value.clone() for name, value in llama.state_dict().items()}
    # one batch per epoch, so that losses compare the same examples
    recipe = lf.Recipe(top=3, select_epochs=3, tune_epochs=3, batch_size=len(EXAMPLES))
    result = fit(llama, tmp_path, recipe, eval_data=HELD_OUT)
    assert lf.handle_of(llama) is result.handle
    assert result.handle.config.scale is None
    assert set(result.handle.config.offset) == set(result.heads)
    assert result.handle.n_parameters() == 3 * HEAD_DIM
    assert result.scores.shape == (LAYERS, HEADS)
    assert result.heads == select_heads(result.scores, 3)
    assert [(row["stage"], row["epoch"]) for row in result.history] == [
        (stage, epoch) for stage in ("select", "tune") for epoch in (1, 2, 3)
    ]
    for stage in ("select", "tune"):
        losses = [row["loss"] for row in result.history if row["stage"] == stage]
        assert losses == sorted(losses, reverse=True)
        measured = result.metrics[stage]
        assert measured.keys() == {"seconds", "tokens_per_s", "examples_per_s", "peak_memory_bytes", "exact_match"}
        assert measured["tokens_per_s"] * measured["seconds"] == pytest.approx(3 * len(EXAMPLES) * 8)
    assert all(row["l1"] > 0 for row in result.history if row["stage"] == "select")
    # keys as in the base model, and not one of its numbers moved
    after = llama.state_dict()
    assert after.keys() == base.keys()
    assert all(after[name].equal(value) for name, value in base.items())


def test_fit_fills_the_run_folder(llama, tmp_path):
    result = fit(llama, tmp_path, eval_data=HELD_OUT)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["stage"] == "done"
    assert state["metrics"] == result.metrics
    assert {path.name for path in tmp_path.iterdir()} == {
        "state.json",
        "select",
        "tune",
        "heads.json",
        "history.jsonl",
        "adapter",
    }
    heads = json.loads((tmp_path / "heads.json").read_text())
    assert [tuple(pair) for pair in heads["heads"]] == result.heads
    assert torch.tensor(heads["scores"]).equal(result.scores)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert history == result.history
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for stage in ("select", "tune"):
        (checkpoint,) = (tmp_path / stage).glob("checkpoint-*")
        names = {path.name for path in checkpoint.iterdir()}
        assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt"} <= names
        assert "model.safetensors" not in names
    assert_whole(tmp_path)


def test_fit_saves_what_it_returns(llama, tmp_path):
    result = fit(llama, tmp_path)
    expected = vectors(result.handle)
    result.handle.unpatch()
    assert_equal_vectors(vectors(lf.load(llama, tmp_path / "adapter")), expected)


@pytest.mark.parametrize(("top", "count"), [(5, 5), (0.5, 6), (0.01, 1), (1.0, 12)])
def test_fit_keeps_top_heads(llama, tmp_path, top, count):
    result = fit(llama, tmp_path, lf.Recipe(top=top, select_epochs=1, tune_epochs=1))
    assert len(result.heads) == len(set(result.heads)) == count
    assert result.handle.n_parameters() == count * HEAD_DIM


def test_fit_keeps_heads_of_the_upper_layers(llama, tmp_path):
    result = fit(llama, tmp_path, lf.Recipe(top=0.5, min_layer=1, select_epochs=1, tune_epochs=1))
    assert len(result.heads) == HEADS
    assert min(layer for layer, _ in result.heads) >= 1
    # the scores are those of every head, as without
    assert result.scores.isfinite().all()


def test_fit_on_given_heads_skips_step_1(llama, tmp_path):
    heads = [(2, 1), (0, 3)]
    result = fit(llama, tmp_path, heads=heads)
    assert (result.heads, result.scores) == (heads, None)
    assert {row["stage"] for row in result.history} == {"tune"}
    assert result.metrics.keys() == {"tune"}
    assert not (tmp_path / "select").exists()
    assert [tuple(pair) for pair in json.loads((tmp_path / "heads.json").read_text())["heads"]] == heads


def test_fit_step_2_starts_from_the_base(llama, tmp_path):
    # the same offsets whether step 1 has run before or not
    result = fit(llama, tmp_path / "both")
    expected = vectors(result.handle)
    result.handle.unpatch()
    alone = fit(llama, tmp_path / "alone", heads=result.heads)
    assert_equal_vectors(vectors(alone.handle), expected)


def test_fit_is_deterministic(llama, tmp_path):
    results = []
    for name in ("first", "second"):
        result = fit(llama, tmp_path / name, RECIPE, eval_data=HELD_OUT)
        results.append(result)
        torch.manual_seed(999)
        result.handle.unpatch()
    first, second = results
    assert first.heads == second.heads
    assert first.scores.equal(second.scores)
    assert_equal_vectors(vectors(first.handle), vectors(second.handle))
    strip = [[{k: v for k, v in row.items() if k not in CLOCKED} for row in r.history] for r in results]
    assert strip[0] == strip[1]


def test_fit_depends_on_the_seed(llama, tmp_path):
    results = []
    for seed in (1, 2):
        result = fit(llama, tmp_path / str(seed), lf.Recipe(top=2, select_epochs=1, tune_epochs=1, seed=seed))
        results.append(result.scores)
        result.handle.unpatch()
    assert not results[0].equal(results[1])


def test_fit_leaves_the_model_usable_elsewhere(llama, tmp_path):
    before = state_of(llama)
    fit(llama, tmp_path).handle.unpatch()
    assert_same_state(llama, before, but=("modes", "config"))


def test_fit_leaves_mode_and_config_alone(llama, tmp_path):
    # `use_cache` in the config decides whether a forward pass returns a cache, and is saved with the model
    before = state_of(llama)
    fit(llama, tmp_path).handle.unpatch()
    assert_same_state(llama, before)


class Interrupted(BaseException):
    """As a Ctrl-C: not an Exception."""


def interrupt_at(monkeypatch, stage, epoch):
    append = RunFolder.append_history

    def raising(self, row):
        if (row["stage"], row["epoch"]) == (stage, epoch):
            raise Interrupted
        append(self, row)

    monkeypatch.setattr(RunFolder, "append_history", raising)


# in the first case there is no checkpoint yet
@pytest.mark.parametrize(("stage", "epoch"), [("select", 1), ("select", 2), ("tune", 2)])
def test_fit_resumes(llama, tmp_path, monkeypatch, stage, epoch):
    whole = fit(llama, tmp_path / "whole", RECIPE, eval_data=HELD_OUT)
    expected = vectors(whole.handle)
    whole.handle.unpatch()
    before = state_of(llama)
    with monkeypatch.context() as patched:
        interrupt_at(patched, stage, epoch)
        with pytest.raises(Interrupted):
            fit(llama, tmp_path / "cut", RECIPE, eval_data=HELD_OUT)
    assert_same_state(llama, before, but=("modes", "config"))
    assert_whole(tmp_path / "cut")
    torch.manual_seed(999)
    steps = []
    with monkeypatch.context() as patched:
        count_steps(patched, steps)
        resumed = fit(llama, tmp_path / "cut", RECIPE, eval_data=HELD_OUT)
    # two steps an epoch; only what was not checkpointed is trained again
    assert len(steps) == 2 * (3 - epoch + 1) + (6 if stage == "select" else 0)
    assert resumed.heads == whole.heads
    assert resumed.scores.equal(whole.scores)
    assert_equal_vectors(vectors(resumed.handle), expected)
    timeless = [[{k: v for k, v in row.items() if k not in CLOCKED} for row in r.history] for r in (whole, resumed)]
    assert timeless[0] == timeless[1]
    assert resumed.metrics["tune"]["exact_match"] == whole.metrics["tune"]["exact_match"]


def count_steps(monkeypatch, steps):
    compute = recipe_module.LofitTrainer.compute_loss

    def counting(self, model, *args, **options):
        if model.training:
            steps.append(None)
        return compute(self, model, *args, **options)

    monkeypatch.setattr(recipe_module.LofitTrainer, "compute_loss", counting)


# between two files that are written one after the other
@pytest.mark.parametrize(("method", "stage"), [("write_heads", None), ("record", "select"), ("record", "tune")])
def test_fit_resumes_between_stages(llama, tmp_path, monkeypatch, method, stage):
    whole = fit(llama, tmp_path / "whole", RECIPE)
    expected = vectors(whole.handle)
    whole.handle.unpatch()
    original = getattr(RunFolder, method)

    def raising(self, *args):
        if stage in (None, args[0]):
            raise Interrupted
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, method, raising)
        with pytest.raises(Interrupted):
            fit(llama, tmp_path / "cut", RECIPE)
    assert lf.handle_of(llama) is None
    resumed = fit(llama, tmp_path / "cut", RECIPE)
    assert resumed.heads == whole.heads
    assert_equal_vectors(vectors(resumed.handle), expected)
    assert resumed.metrics.keys() == {"select", "tune"}


def test_fit_of_a_done_run_trains_nothing(llama, tmp_path, monkeypatch):
    first = fit(llama, tmp_path, eval_data=HELD_OUT)
    expected = vectors(first.handle)
    first.handle.unpatch()
    steps = []
    count_steps(monkeypatch, steps)
    again = fit(llama, tmp_path, eval_data=HELD_OUT)
    assert steps == []
    assert (again.heads, again.history, again.metrics) == (first.heads, first.history, first.metrics)
    assert again.scores.equal(first.scores)
    assert lf.handle_of(llama) is again.handle
    assert_equal_vectors(vectors(again.handle), expected)


def test_fit_starts_over(llama, tmp_path, monkeypatch):
    fit(llama, tmp_path).handle.unpatch()
    steps = []
    count_steps(monkeypatch, steps)
    result = fit(llama, tmp_path, resume=False)
    assert len(steps) == 4
    assert len(result.history) == 2


def test_fit_starts_over_without_the_old_checkpoints(llama, tmp_path, monkeypatch):
    # a run is replaced by another one, which is interrupted: it must go on from its own checkpoint or from nothing
    other = lf.Recipe(top=3, select_epochs=3, tune_epochs=3, select_lr=1e-1)
    fit(llama, tmp_path / "run", RECIPE).handle.unpatch()
    whole = fit(llama, tmp_path / "whole", other)
    expected = vectors(whole.handle)
    whole.handle.unpatch()
    with monkeypatch.context() as patched:
        interrupt_at(patched, "select", 2)
        with pytest.raises(Interrupted):
            fit(llama, tmp_path / "run", other, resume=False)
    resumed = fit(llama, tmp_path / "run", other)
    assert resumed.scores.equal(whole.scores)
    assert_equal_vectors(vectors(resumed.handle), expected)


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


@pytest.mark.parametrize("epochs", [(0, 1), (1, 0)])
def test_fit_without_epochs(llama, tmp_path, epochs):
    select, tune = epochs
    result = fit(llama, tmp_path, lf.Recipe(top=2, select_epochs=select, tune_epochs=tune))
    assert len(result.history) == 1
    assert len(result.heads) == 2


def test_fit_accepts_examples_and_tuples(llama, tmp_path):
    from lofit_fast.tasks import Example

    examples = tuple(Example(e["prompt"], e["completion"]) for e in EXAMPLES)
    result = fit(llama, tmp_path, examples=examples, eval_data=examples[:1])
    assert 0 <= result.metrics["tune"]["exact_match"] <= 1


def test_fit_in_bfloat16_keeps_float32_vectors(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    result = fit(model, tmp_path)
    assert {p.dtype for p in result.handle.parameters()} == {torch.float32}
    assert all(t.dtype == torch.float32 for t in read_adapter(tmp_path / "adapter").tensors.values())


def test_fit_in_float64(tmp_path):
    result = fit(tiny_model("llama", torch.float64), tmp_path)
    assert {p.dtype for p in result.handle.parameters()} == {torch.float64}


def test_fit_merges_into_a_plain_model(llama, tmp_path):
    result = fit(llama, tmp_path)
    with torch.no_grad():
        expected = llama(tokens()).logits
        plain = result.handle.merge()
        assert plain is llama
        assert lf.handle_of(plain) is None
        torch.testing.assert_close(plain(tokens()).logits, expected)
        plain.save_pretrained(tmp_path / "plain")
        reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "plain")
        torch.testing.assert_close(reloaded(tokens()).logits, expected)


def test_fit_merges_into_a_model_that_can_be_trained(llama, tmp_path):
    plain = fit(llama, tmp_path).handle.merge()
    assert [name for name, p in plain.named_parameters() if not p.requires_grad] == []
