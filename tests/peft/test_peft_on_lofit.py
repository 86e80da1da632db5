"""LoFiT first, then PEFT: beside ours it works and is noticed, on ours it is refused."""

import pytest
import torch

pytest.importorskip("peft")
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

import lofit_fast as lf
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.peft_layers import tuner_layers
from tests.library_versions import compiles_hooks
from tests.oracle import Hook, randomize, vectors_of
from tests.ordinary_sample import some_now
from tests.patched_models import CONFIGS, logits, loss, relative, snapshot
from tests.peft.peft_models import ADAPTERS, ENTRIES, base_of, enter, fill, quietly, with_peft
from tests.tiny_models import tiny_model

NEAR = 1e-5


def patched_then(adapter: str, how: str = "get_peft_model") -> tuple[nn.Module, lf.LofitHandle]:
    model = tiny_model("llama")
    handle = lf.patch(model, CONFIGS["both"])
    randomize(handle)
    torch.manual_seed(5)
    return enter(model, adapter, how), handle


@pytest.mark.parametrize("how", ENTRIES)
def test_peft_beside_lofit_is_right(how):
    model, handle = patched_then("lora_qv", how)
    twin = with_peft("lora_qv", how)
    base = logits(tiny_model("llama"))
    Hook(base_of(twin), vectors_of(handle))
    assert relative(logits(model.eval()), logits(twin)) < NEAR
    if how == "get_peft_model":
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        merged = model.merge_and_unload()
        assert relative(logits(merged), logits(twin)) < NEAR
        handle.unpatch()
        other = with_peft("lora_qv").merge_and_unload()
        assert torch.equal(logits(merged), logits(other))


@pytest.mark.parametrize("how", ENTRIES)
def test_vectors_that_peft_froze_are_noticed_in_training(how):
    model, handle = patched_then("lora_qv", how)
    assert not any(p.requires_grad for p in handle.parameters())
    # judging and generating need no gradients
    logits(model.eval())
    with torch.no_grad():
        logits(model.train())
    with pytest.raises(ValueError, match="PEFT has frozen LoFiT's vectors.*requires_grad_"):
        logits(model)


@pytest.mark.parametrize("trained", [True, False])
def test_saying_which_is_trained_ends_the_refusal(trained):
    model, handle = patched_then("lora_qv")
    handle.requires_grad_(trained)
    loss(model.train()).backward()
    assert all((p.grad is not None) == trained for p in handle.parameters())
    assert any("lora_" in name and p.grad is not None for name, p in model.named_parameters())


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts_freeze_in_silence_no_more(config):
    # PEFT's prefixes have the width of hidden size over heads
    model = tiny_model("llama", head_dim=8)
    handle = lf.patch(model, CONFIGS["both"])
    prompted = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PEFT has frozen LoFiT's vectors"):
        logits(prompted.train())
    handle.requires_grad_()
    logits(prompted)


def compiled(model: nn.Module, **options) -> nn.Module:
    """The model whole, as TrainingArguments(torch_compile=True) has it."""
    return torch.compile(model, backend="eager", **options)


# where PEFT's switch is, of the adapters that were put there in each way
@pytest.mark.slow
@compiles_hooks
@pytest.mark.parametrize("how", ENTRIES)
def test_peft_that_entered_is_seen_before_a_model_is_compiled_whole(dynamo, how):
    model, handle = patched_then("lora_qv", how)
    twin, run = tiny_model("llama"), compiled(model)

    def switch(on: bool) -> None:
        # what `disable_adapter()` does, which not every way has
        for _, _, layer in tuner_layers(model):
            layer.enable_adapters(on)

    switch(False)
    assert relative(logits(run), logits(twin)) < NEAR
    switch(True)
    assert relative(logits(run), logits(model)) < NEAR and not torch.allclose(logits(run), logits(twin), rtol=1e-3)
    switch(False)
    assert relative(logits(run), logits(twin)) < NEAR


@compiles_hooks
@pytest.mark.parametrize("seen", some_now([False, True], True))
def test_vectors_that_peft_froze_are_noticed_in_a_model_compiled_whole(dynamo, seen):
    model, handle = patched_then("lora_qv")
    if seen:
        logits(model)
    run = compiled(model.train())
    with pytest.raises(ValueError, match=r"PEFT has frozen LoFiT's vectors.*handle\.requires_grad_\(True\)"):
        loss(run)
    handle.requires_grad_()
    loss(run).backward()
    assert all(p.grad is not None for p in handle.parameters())


@pytest.mark.slow
@compiles_hooks
def test_a_whole_graph_is_refused_until_peft_has_been_seen_and_is_one(dynamo):
    model, handle = patched_then("lora_qv")
    handle.requires_grad_()
    run = compiled(model.train(), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"run one forward before torch\.compile"):
        loss(run)
    loss(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        loss(run).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(p.grad is not None for p in handle.parameters())


def test_a_second_adapter_freezes_nothing():
    model = with_peft("lora_qv")
    handle = quietly(lf.patch, model, CONFIGS["both"])
    model.add_adapter("second", LoraConfig(r=1, target_modules=["v_proj"]))
    loss(model.train()).backward()
    assert all(p.grad is not None for p in handle.parameters())


def test_a_second_adapter_on_the_projection_is_refused():
    model = with_peft("lora_o")
    quietly(lf.patch, model, CONFIGS["both"])
    expected = logits(model)
    with pytest.raises(ValueError, match="LofitLinear"):
        model.add_adapter("second", LoraConfig(r=1, target_modules=["o_proj"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


# by PEFT's names; the others need more than the name of a module, or look at other modules
METHODS = ("BEFT", "BOFT", "DELORA", "GRALORA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF")
METHODS += ("RANDLORA", "UNILORA", "VERA", "WAVEFT")


@pytest.mark.parametrize("method", METHODS)
def test_peft_on_the_projection_is_refused_and_drops_nothing(method):
    model = tiny_model("llama")
    handle = lf.patch(model, CONFIGS["both"])
    randomize(handle)
    before, expected = snapshot(model), logits(model)
    more = {"feedforward_modules": []} if method == "IA3" else {}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["o_proj"], **more)
    try:
        quietly(get_peft_model, model, config)
    except (TypeError, ValueError):
        assert snapshot(model) == before
    else:
        # this one passes over what it does not know
        assert method == "OSF"
    assert isinstance(model.model.layers[1].self_attn.o_proj, LofitLinear)
    assert torch.equal(logits(model), expected)


def test_a_refusal_half_way_changes_no_number():
    model = tiny_model("llama")
    handle = lf.patch(model, CONFIGS["both"])
    randomize(handle)
    expected = logits(model)
    with pytest.raises(ValueError, match="LofitLinear"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"]))
    assert torch.equal(logits(model), expected)
    assert all(p.requires_grad for p in handle.parameters())


@pytest.mark.parametrize("name", ["o_proj", "model.layers.1.self_attn.o_proj"])
def test_training_the_projection_whole_is_refused(name):
    model = tiny_model("llama")
    handle = lf.patch(model, CONFIGS["both"])
    randomize(handle)
    expected = logits(model)
    with pytest.raises(ValueError, match="cannot be copied or trained by itself"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[name]))
    assert torch.equal(logits(model), expected)


# what would leave, in the model, copies of our layers that the handle does not know
@pytest.mark.parametrize("what", [{"modules_to_save": ["self_attn"]}, {"layer_replication": [[0, 2], [1, 3]]}])
def test_copies_of_parts_of_the_model_are_refused(what):
    model = tiny_model("llama")
    handle = lf.patch(model, CONFIGS["both"])
    randomize(handle)
    expected = logits(model)
    with pytest.raises(ValueError, match="a part of the model that holds one, cannot be copied or trained by itself"):
        get_peft_model(model, LoraConfig(target_modules=["gate_proj"], **what))
    assert torch.equal(logits(model), expected)


def test_all_linear_layers_are_saved_under_their_own_names(tmp_path):
    model = tiny_model("llama")
    handle = lf.patch(model, CONFIGS["both"])
    randomize(handle)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    fill(adapted)
    handle.requires_grad_(False)
    logits(adapted.train())
    quietly(adapted.save_pretrained, tmp_path)
    got = get_peft_model_state_dict(adapted)
    with handle.disabled():
        expected = logits(adapted.eval())
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert get_peft_model_state_dict(again).keys() == got.keys()
    assert torch.equal(logits(again), expected)


def test_unpatching_under_peft_leaves_the_base_frozen():
    model, handle = patched_then("lora_qv")
    handle.unpatch()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    base = model.unload()
    again = lf.patch(base, CONFIGS["both"])
    again.unpatch()
    assert not any(p.requires_grad for p in base.parameters())


def test_unpatching_after_peft_gives_the_flags_back():
    model = tiny_model("llama")
    before = snapshot(model)
    handle = lf.patch(model, CONFIGS["both"])
    enter(model, "lora_qv").unload()
    handle.unpatch()
    assert snapshot(model) == before


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "lora_qv"])
def test_merging_around_peft_is_refused_before_anything_changes(adapter):
    model = with_peft(adapter)
    handle = quietly(lf.patch, model, CONFIGS["both"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot merge"):
        handle.merge()
    assert snapshot(model) == before
