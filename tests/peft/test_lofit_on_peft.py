"""PEFT first, then LoFiT: whatever PEFT does afterwards, the model equals hooks on the same model without LoFiT."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn

import lofit_fast as lf
from tests.oracle import Hook, randomize, vectors_of
from tests.patched_models import CONFIGS, logits, loss, relative, snapshot
from tests.peft.peft_models import ADAPTERS, ENTRIES, base_of, quietly, with_peft
from tests.tiny_models import tiny_model

NEAR = 1e-5


def patched(model: nn.Module) -> lf.LofitHandle:
    handle = quietly(lf.patch, model, CONFIGS["both"])
    randomize(handle)
    return handle


def equals_hooks(model: nn.Module, handle: lf.LofitHandle, twin: nn.Module) -> bool:
    """Whether the patched model computes what hooks on its twin compute, and neither what the twin does."""
    plain = logits(twin)
    Hook(base_of(twin), vectors_of(handle))
    expected = logits(twin)
    assert relative(expected, plain) > 1e-3
    return relative(logits(model), expected) < NEAR


WAYS = [
    pytest.param(adapter, how, marks=() if adapter == "lora_o" or how == "get_peft_model" else pytest.mark.slow)
    for adapter in ADAPTERS
    for how in ENTRIES
]


@pytest.mark.parametrize("adapter, how", WAYS)
def test_lofit_on_peft_is_a_hook_and_comes_off(adapter, how):
    model, twin = with_peft(adapter, how), with_peft(adapter, how)
    before, untouched = snapshot(model), logits(model)
    handle = patched(model)
    assert equals_hooks(model, handle, twin)
    handle.unpatch()
    assert snapshot(model) == before
    assert torch.equal(logits(model), untouched)


def second_adapter(model: PeftModel) -> None:
    model.add_adapter("second", LoraConfig(r=1, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("second")


def merged_and_back(model: PeftModel) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def deleted(model: PeftModel) -> None:
    model.delete_adapter("default")


# what PEFT's users do next; each returns the model that they then hold
ACTIONS = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merged_and_back": merged_and_back,
    "delete_adapter": deleted,
    "second_adapter": second_adapter,
    "set_adapter": lambda model: model.set_adapter("default"),
}
# a second adapter has to be of the first one's kind
IMPOSSIBLE = {("ia3", "second_adapter"), ("loha_o", "second_adapter")}
CASES = [
    pytest.param(adapter, action, marks=() if adapter == "lora_o" or action == "merge_and_unload" else pytest.mark.slow)
    for adapter in ADAPTERS
    for action in ACTIONS
    if (adapter, action) not in IMPOSSIBLE
]


@pytest.mark.parametrize("adapter, action", CASES)
def test_whatever_peft_does_lofit_stays(adapter, action):
    model, twin = with_peft(adapter), with_peft(adapter)
    handle = patched(model)
    for one in (model, twin):
        torch.manual_seed(9)
        quietly(ACTIONS[action], one)
    # what PEFT unloads is the same object inside, and a PeftModel without an adapter does not run
    gone = action in ("merge_and_unload", "unload", "delete_adapter")
    held, other = (base_of(one) if gone else one for one in (model, twin))
    assert lf.handle_of(held) is handle
    assert equals_hooks(held.eval(), handle, other.eval())
    after = logits(other)
    with handle.disabled():
        assert relative(logits(held), after) > 1e-3
    handle.unpatch()
    assert lf.handle_of(held) is None
    assert not any("inner" in name for name, _ in held.named_modules())


@pytest.mark.parametrize("adapter, how", WAYS)
def test_peft_saves_all_of_its_tensors(adapter, how):
    model = with_peft(adapter, how)
    expected = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    patched(model)
    got = get_peft_model_state_dict(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)


@pytest.mark.parametrize("adapter", ["lora_qv", "lora_o", "ia3"])
def test_a_saved_peft_model_loads_without_lofit_and_into_it(adapter, tmp_path):
    model, plain = with_peft(adapter), logits(with_peft(adapter))
    handle = patched(model)
    expected = logits(model)
    quietly(model.save_pretrained, tmp_path / "peft")
    handle.save(tmp_path / "lofit")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "peft").eval()
    assert torch.equal(logits(again), plain)
    quietly(lf.load, again, tmp_path / "lofit")
    assert torch.equal(logits(again), expected)
    # an adapter's numbers go into a patched model too
    with torch.no_grad():
        for parameter in get_peft_model_state_dict(again).values():
            parameter.zero_()
    again.load_adapter(tmp_path / "peft", "default")
    assert torch.equal(logits(again.eval()), expected)


@pytest.mark.parametrize("adapter, how", [way for way in WAYS if way.values[0].startswith("lora")])
def test_disabled_adapters_mean_the_base(adapter, how):
    model = with_peft(adapter, how)
    base, handle = logits(tiny_model("llama")), patched(model)
    on = logits(model)
    if how == "get_peft_model":
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
            # a grad-enabled forward folds early, and must not
            loss(model)
    elif how == "add_adapter":
        model.disable_adapters()
        assert torch.equal(logits(model), base)
        model.enable_adapters()
    assert torch.equal(logits(model), on)
    with handle.disabled():
        assert relative(logits(model), base) > 1e-3


def test_the_switch_is_found_after_peft_left_and_came_back():
    model = with_peft("lora_qv")
    patched(model)
    model.disable_adapter_layers()
    base = model.unload()
    on = logits(base)
    assert relative(on, logits(tiny_model("llama"))) > 1e-3
    again = quietly(with_new_lora, base)
    assert torch.equal(logits(again), on)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(tiny_model("llama")))


def with_new_lora(base: nn.Module) -> PeftModel:
    pytest.importorskip("peft")
    from peft import get_peft_model

    return get_peft_model(base, LoraConfig(r=1, target_modules=["up_proj"])).eval()


def test_patching_says_that_it_freezes_peft():
    model = with_peft("lora_qv")
    with pytest.warns(UserWarning, match="frozen PEFT's adapters too: model.set_adapter"):
        handle = lf.patch(model, CONFIGS["both"])
    model.set_adapter("default")
    loss(model).backward()
    ours = {id(p) for p in handle.parameters()}
    trained = [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in ours]
    assert len(trained) == 12
    assert all("lora_" in name for name in trained)
    assert all(p.grad is not None for p in handle.parameters())


def test_a_reference_that_moves_with_the_policy_is_refused():
    model = with_peft("lora_qv")
    handle = patched(model)
    # what TRL does with a PeftModel that is its policy
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    with torch.no_grad(), pytest.raises(ValueError, match="the reference would change with them. Give the trainer"):
        logits(model)
    with handle.disabled():
        logits(model)
    handle.requires_grad_(False)
    logits(model)
    handle.requires_grad_()
    model.set_adapter("default")
    logits(model)


def test_adapters_that_peft_would_not_save_are_refused(monkeypatch):
    from lofit_fast.patching.peft_layers import NameBelow

    model = with_peft("lora_o")
    before = snapshot(model)
    # a PEFT that puts names together in another way
    monkeypatch.setattr(NameBelow, "__format__", lambda self, spec: str(self))
    with pytest.raises(ValueError, match="PEFT would no longer save them whole"):
        lf.patch(model, CONFIGS["both"])
    assert snapshot(model) == before


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "adapter, copied, state",
    [("lora_qv", copy.deepcopy, "on"), ("lora_o", copy.deepcopy, "off"), ("lora_o", pickled, "on")],
)
def test_copies_are_whole(adapter, copied, state):
    model = with_peft(adapter)
    handle = patched(model)
    if state == "off":
        model.disable_adapter_layers()
    expected = logits(model)
    again = copied(model)
    assert lf.handle_of(again) is not handle
    assert torch.equal(logits(again), expected)
    model.enable_adapter_layers()
    randomize(handle, seed=8)
    assert torch.equal(logits(again), expected)
    # the copy's own switch is what switches the copy
    again.disable_adapter_layers()
    assert torch.equal(logits(again), logits(tiny_model("llama")))
    again.enable_adapter_layers()
    lf.handle_of(again).unpatch()
    assert torch.equal(logits(again), logits(with_peft(adapter)))


def bare(module: nn.Module) -> nn.Module:
    """What a tool computes with that looks below every wrapper it knows of."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


@pytest.mark.parametrize("adapter", ["lora_qv", "lora_o"])
def test_unwrapping_tools_do_not_drop_lofit(adapter):
    model = base_of(with_peft(adapter))
    handle = patched(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if bare(child) is not child:
                setattr(parent, name, bare(child))
    assert equals_hooks(model, handle, tiny_model("llama"))
