"""Whole fits of models that assume nothing stock: attention of their own, hybrids, wrappers; and what is refused."""

import json

import pytest
import torch
import transformers

import lofit_fast as lf
from lofit_fast.cpu.attention import GROUPED
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.families import ARCHITECTURES
from lofit_fast.tasks.task import Preference
from tests.ordinary_sample import crossed
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.engine.engine_families import family_model
from tests.training.tiny_runs import EXAMPLES, assert_same_state, fit, state_of

QUICK = lf.Recipe(top=3, select_epochs=1, tune_epochs=1, batch_size=6)
# 12 examples in batches of 4: 42 steps in each stage
LONG = lf.Recipe(top=3, select_epochs=14, tune_epochs=14, batch_size=4, tune_lr=1e-2)


@pytest.mark.parametrize("recipe", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3_5", "vaultgemma", "llava"])
def test_fit_takes_an_attention_that_the_model_has(family, recipe, tmp_path):
    model = family_model(family)
    own = text_config(model)._attn_implementation
    result = fit(model, tmp_path, recipe)
    engine = json.loads((tmp_path / "state.json").read_text())["engine"]["tune"]
    listed = text_config(model).model_type in ARCHITECTURES
    assert engine["attention"] == (GROUPED if listed else own)
    assert text_config(model)._attn_implementation == own
    losses = [row["loss"] for row in result.history if row["stage"] == "tune"]
    assert losses[-1] < losses[0] or recipe is QUICK


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fit_of_attention_sinks_in_grouped_rows(packing, tmp_path):
    # sinks have no part in the weights: the run must be that of the model's own attention
    engines = lf.Engine(attention=GROUPED, packing=packing), lf.Engine(attention="eager", packing=False)
    runs = [fit(family_model("gpt_oss"), tmp_path / e.attention, QUICK, engine=e) for e in engines]
    losses = [[row["loss"] for row in run.history] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("qwen3_next_dense", marks=pytest.mark.slow)])
def test_fit_of_a_hybrid_is_that_of_a_plain_engine(family, tmp_path):
    plain = lf.Engine(attention="sdpa", packing=False, narrow=False, compile=False)
    runs = [fit(family_model(family), tmp_path / n, QUICK, engine=e) for n, e in (("auto", None), ("plain", plain))]
    losses = [[row["loss"] for row in run.history] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_folder_of_a_model_without_sdpa_loads_and_answers(family, tmp_path):
    from lofit_fast.models.load import load_model

    family_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), dtype="float32", device="cpu")
    handle = lf.patch(model, lf.LofitConfig(offset="all", init_std=0.1))
    assert len(model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=2)[0]) > 2
    handle.merge()


HEADLESS = ("LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaModel", "LlamaForQuestionAnswering")


@pytest.mark.parametrize("kind, how", crossed(HEADLESS, ["fit", "fit_preferences"]))
def test_fit_refuses_what_predicts_no_tokens(kind, how, tmp_path):
    model = getattr(transformers, kind)(tiny_model("llama").config)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"expected a language model, got {kind}, which has no output over the vocab"):
        if how == "fit":
            fit(model, tmp_path / "run")
        else:
            pairs = [Preference("a", "b", ("c",))]
            lf.fit_preferences(model, tiny_tokenizer(), pairs, output_dir=tmp_path / "run", progress=False)
    assert_same_state(model, before)
    assert not (tmp_path / "run").exists()


def test_fit_refuses_heads_that_cannot_share(tmp_path):
    model = tiny_model("llama", hidden_size=56, num_attention_heads=7, num_key_value_heads=2, head_dim=8)
    before = state_of(model)
    with pytest.raises(ValueError, match="7 query heads on 2 heads of keys and values"):
        fit(model, tmp_path / "run")
    assert_same_state(model, before)


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fit_leaves_every_config_as_it_was(packing, tmp_path):
    model = family_model("llava")
    configs = [model.config, model.config.text_config, model.config.vision_config]
    before = [dict(vars(config)) for config in configs]
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, given: seen.append((m.training, text_config(m).use_cache)), with_kwargs=True
    )
    fit(model, tmp_path, lf.Recipe(top=2, select_epochs=1, tune_epochs=1), EXAMPLES, engine=lf.Engine(packing=packing))
    assert {cache for training, cache in seen if training} == {False}
    assert [dict(vars(config)) for config in configs] == before
    assert isinstance(model.lm_head, torch.nn.Linear)
