"""The numbers of a patched model: against hooks, PEFT and the base."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lofit_fast import LofitConfig, patch
from tests.oracle import Hook, randomize, vectors_of
from tests.ordinary_sample import slow_if
from tests.patched_models import CONFIGS, SOME, logits, loss, relative, snapshot
from tests.tiny_models import FAMILIES, HEAD_DIM, HEADS, tiny_model, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_with_zero_vectors_is_the_base_to_the_bit(family, dtype):
    model = tiny_model(family, dtype)
    expected = logits(model)
    patch(model, LofitConfig(scale="all", offset="all", init_std=0.0))
    assert torch.equal(logits(model), expected)


def test_patch_with_zero_vectors_is_the_base_to_the_bit_with_biases():
    model = tiny_model("llama", attention_bias=True)
    nn.init.normal_(model.model.layers[0].self_attn.o_proj.bias)
    expected = logits(model)
    patch(model, LofitConfig(scale="all", offset="all", init_std=0.0))
    assert torch.equal(logits(model), expected)


# in the ordinary run a Llama has every config, the others both vectors at once; slow: every family every one
@pytest.mark.parametrize(
    "family, dtype, tolerance, config",
    slow_if(
        lambda family, dtype, tolerance, config: family != "llama" and config != "both",
        [(f, *d, c) for f, d, c in product(FAMILIES, [(torch.float32, 1e-5), (torch.float64, 1e-10)], CONFIGS)],
    ),
)
def test_patch_computes_what_hooks_compute(family, dtype, tolerance, config):
    model, hooked = tiny_model(family, dtype), tiny_model(family, dtype)
    base = logits(model)
    handle = patch(model, CONFIGS[config])
    model.to(dtype)
    randomize(handle)
    Hook(hooked, vectors_of(handle), dtype)
    expected = logits(hooked)
    assert relative(logits(model), expected) < tolerance
    # the comparison means something
    assert relative(base, expected) > 1e-3


@pytest.mark.parametrize("config", CONFIGS)
def test_patch_of_a_float64_model_is_float64(config):
    model = tiny_model("llama", torch.float64)
    handle = patch(model, CONFIGS[config])
    assert {p.dtype for p in handle.parameters()} == {torch.float64}
    assert logits(model).dtype == torch.float64


def gradient_error(found: dict[tuple[int, str], Tensor], exact: dict[tuple[int, str], Tensor], component: str) -> float:
    keys = [key for key in exact if key[1] == component]
    difference = torch.cat([(found[k].double() - exact[k]).flatten() for k in keys])
    return (difference.norm() / torch.cat([exact[k].flatten() for k in keys]).norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_gradients_are_as_good_as_hooks(family, dtype):
    model, hooked = tiny_model(family, dtype), tiny_model(family, dtype)
    handle = patch(model, CONFIGS["both"])
    randomize(handle)
    wide = tiny_model(family, dtype).double()
    oracles = Hook(hooked, vectors_of(handle)), Hook(wide, vectors_of(handle), torch.float64)
    for m in (model, hooked, wide):
        loss(m).backward()
    by_hook, exact = ({key: p.grad for key, p in oracle.parameters.items()} for oracle in oracles)
    found = {
        (number, component): getattr(layer, component).grad
        for number, layer in handle.layers.items()
        for component in ("scale", "offset")
        if getattr(layer, component) is not None
    }
    for component in ("scale", "offset"):
        assert gradient_error(found, exact, component) <= 2 * gradient_error(by_hook, exact, component)


def test_patch_gradients_reach_no_frozen_weight(family):
    model = tiny_model(family)
    handle = patch(model, CONFIGS["both"])
    loss(model).backward()
    ours = {id(p) for p in handle.parameters()}
    assert all((p.grad is not None) == (id(p) in ours) for p in model.parameters())


def test_patch_scales_are_ia3():
    pytest.importorskip("peft")
    from peft import IA3Config, get_peft_model

    model = tiny_model("llama", torch.float64)
    targets = {"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]}
    oracle = get_peft_model(tiny_model("llama", torch.float64), IA3Config(**targets)).double()
    handle = patch(model, LofitConfig(scale="all"))
    model.double()
    randomize(handle)
    layers = oracle.get_base_model().model.layers
    vectors = [layer.self_attn.o_proj.ia3_l["default"] for layer in layers]
    with torch.no_grad():
        for vector, layer in zip(vectors, handle.layers.values(), strict=True):
            vector.copy_(1 + layer.scale.view_as(vector))
    assert relative(logits(model), logits(oracle)) < 1e-12
    loss(model).backward()
    loss(oracle).backward()
    for vector, layer in zip(vectors, handle.layers.values(), strict=True):
        assert relative(layer.scale.grad.view_as(vector), vector.grad) < 1e-6


# attention rows sum to 1: an offset on the values is one on every head's output
def test_patch_offsets_are_beft_without_grouped_heads():
    pytest.importorskip("peft")
    from peft import BeftConfig, get_peft_model

    def build():
        return tiny_model("llama", torch.float64, num_key_value_heads=HEADS, attn_implementation="sdpa")

    model = build()
    oracle = get_peft_model(build(), BeftConfig(target_modules=["v_proj"])).double()
    assert model.config._attn_implementation == "sdpa"
    handle = patch(model, LofitConfig(offset="all"))
    model.double()
    randomize(handle)
    with torch.no_grad():
        for number, layer in handle.layers.items():
            bias = oracle.get_base_model().model.layers[number].self_attn.v_proj.beft_bias["default"]
            bias.copy_(layer.offset.view_as(bias))
    assert relative(logits(model), logits(oracle)) < 1e-12


def test_patch_offsets_are_a_lora_bias():
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model, lora = tiny_model("llama", torch.float64), LoraConfig(r=2, lora_alpha=6, lora_bias=True)
    lora.target_modules = {"o_proj"}
    oracle = get_peft_model(tiny_model("llama", torch.float64), lora).double()
    handle = patch(model, LofitConfig(offset=SOME))
    model.double()
    randomize(handle)
    with torch.no_grad():
        for number, layer in handle.layers.items():
            adapted = oracle.get_base_model().model.layers[number].self_attn.o_proj
            dense = layer.offset.new_zeros(HEADS, HEAD_DIM).index_copy(0, layer.offset_heads, layer.offset)
            adapted.lora_A["default"].weight.zero_()
            adapted.lora_B["default"].weight.zero_()
            adapted.lora_B["default"].bias.copy_(layer.weight @ dense.flatten() / adapted.scaling["default"])
    assert adapted.scaling["default"] == 3
    assert relative(logits(model), logits(oracle)) < 1e-12


@pytest.mark.parametrize("config", CONFIGS)
def test_patch_keeps_lora_on_the_projection(config):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    def build():
        torch.manual_seed(11)
        base = tiny_model("llama", torch.float64)
        adapter = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        return get_peft_model(base, adapter).double().eval()

    model, hooked = build(), build()
    with_lora = logits(model)
    with model.disable_adapter():
        assert relative(logits(model), with_lora) > 1e-3
    handle = patch(model, CONFIGS[config])
    model.double()
    randomize(handle)
    Hook(hooked.get_base_model(), vectors_of(handle), torch.float64)
    assert relative(logits(model), logits(hooked)) < 1e-12
    assert relative(logits(model), with_lora) > 1e-3
    handle.unpatch()
    assert torch.equal(logits(model), with_lora)


def test_patch_of_lora_takes_the_loras_flags_back():
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    before = snapshot(model)
    handle = patch(model, CONFIGS["both"])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in handle.parameters()}
    handle.unpatch()
    assert snapshot(model) == before


@pytest.mark.parametrize("when", ["before", "after"])
def test_patch_keeps_hooks_on_the_projection(llama, when):
    heard = []
    o_proj = llama.model.layers[1].self_attn.o_proj
    hook = lambda module, args, output: heard.append(output)  # noqa: E731
    if when == "before":
        o_proj.register_forward_hook(hook)
    handle = patch(llama, CONFIGS["both"])
    if when == "after":
        o_proj.register_forward_hook(hook)
    randomize(handle)
    logits(llama)
    assert len(heard) == 1
    handle.unpatch()
    logits(llama)
    assert len(heard) == 2


def test_patch_keeps_hooks_on_what_stands_in_for_the_projection(llama):
    heard = []
    patch(llama, CONFIGS["both"])
    llama.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *args: heard.append(args))
    logits(llama)
    assert len(heard) == 1


def test_disabled_is_the_base(family):
    model = tiny_model(family)
    base = logits(model)
    handle = patch(model, CONFIGS["both"])
    randomize(handle)
    patched = logits(model)
    with handle.disabled():
        assert torch.equal(logits(model), base)
        with handle.disabled():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), patched)
    assert not torch.equal(patched, base)


def test_switches_end_with_an_exception(llama):
    handle = patch(llama, CONFIGS["both"])
    randomize(handle)
    patched = logits(llama)
    for scope in (handle.disabled, handle.folded):
        with pytest.raises(RuntimeError, match="inside"), scope():
            raise RuntimeError("inside")
        assert torch.equal(logits(llama), patched)
        assert torch.is_grad_enabled()
        assert all(layer.here.kept is None for layer in handle.layers.values())


@pytest.mark.parametrize(
    "family, config", [*((f, "both") for f in FAMILIES), ("llama", "scale_all"), ("llama", "offset_some")]
)
def test_folded_is_the_patched_model_without_gradients(family, config):
    model = tiny_model(family, torch.float64)
    handle = patch(model, CONFIGS[config])
    model.double()
    randomize(handle)
    patched = logits(model)
    with handle.folded():
        folded = logits(model)
        assert not folded.requires_grad
        with handle.folded(), handle.disabled():
            base = logits(model)
        assert relative(logits(model), patched) < 1e-12
    assert relative(folded, patched) < 1e-12
    assert relative(base, patched) > 1e-3
    assert logits(model).requires_grad


def test_folded_folds_once(llama, monkeypatch):
    calls = []
    from lofit_fast.patching import layer as layer_module

    fold = layer_module.fold_offset
    monkeypatch.setattr(layer_module, "fold_offset", lambda *args: calls.append(args) or fold(*args))
    handle = patch(llama, CONFIGS["both"])
    with handle.folded():
        for _ in range(3):
            logits(llama)
    assert len(calls) == len([x for x in handle.layers.values() if x.offset is not None])


def train(evaluate: str) -> tuple[list[Tensor], list[Tensor]]:
    """Three fused AdamW steps of two micro-batches. Returns the vectors and what each evaluation saw."""
    model = tiny_model("llama")
    handle = patch(model, LofitConfig(scale=[(0, 1)], offset=SOME))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2, fused=True)
    seen = []
    for step in range(3):
        for micro in range(2):
            ids = tokens(seed=10 * step + micro)
            out = model(ids).logits[:, :-1].flatten(0, 1)
            (nn.functional.cross_entropy(out, ids[:, 1:].flatten()) / 2).backward()
            if evaluate == "folded":
                with handle.folded():
                    seen.append(logits(model))
            elif evaluate == "plain":
                with torch.no_grad():
                    seen.append(logits(model))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in handle.parameters()], seen


def test_folding_between_fused_steps_changes_nothing():
    alone, _ = train("never")
    folded, seen_folded = train("folded")
    plainly, seen_plainly = train("plain")
    assert all(torch.equal(a, b) for a, b in zip(alone, folded, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, plainly, strict=True))
    # a stale fold would show: every step moves the vectors by 1e-2
    assert all(relative(a, b) < 1e-6 for a, b in zip(seen_folded, seen_plainly, strict=True))
    assert relative(seen_folded[-1], seen_folded[0]) > 1e-4


def test_written_data_is_seen_at_once(llama):
    handle = patch(llama, CONFIGS["offset_some"])
    with torch.no_grad():
        first = logits(llama)
        for parameter in handle.parameters():
            parameter.data.add_(1)
        assert relative(logits(llama), first) > 1e-3
