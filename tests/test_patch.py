"""Patching a model and taking it back: the numbers against hooks and PEFT, the objects against themselves."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lofit_fast import LofitConfig, handle_of, patch
from lofit_fast.layer import LofitLinear
from tests.hook import Hook, randomize, vectors_of
from tests.test_architectures import gpt2
from tests.tiny import FAMILIES, HEAD_DIM, HEADS, LAYERS, tiny_model, tokens

SOME = [(0, 1), (1, 0), (1, 3), (2, 2)]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONFIGS = {
    "scale_all": LofitConfig(scale="all"),
    "offset_some": LofitConfig(offset=SOME),
    "both": LofitConfig(scale=[(0, 0), (1, 1), (1, 2)], offset=SOME),
}


def logits(model) -> Tensor:
    return model(tokens()).logits


def loss(model) -> Tensor:
    ids = tokens(seed=5)
    return nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def snapshot(model: nn.Module) -> dict[str, tuple]:
    """Everything a refused or undone patch must leave as it was, by name."""
    seen: dict[str, tuple] = {"state": tuple(model.state_dict())}
    for name, module in model.named_modules():
        hooks = [list(getattr(module, kind).items()) for kind in HOOKS]
        seen[f"module {name}"] = (id(module), module.training, vars(module).get("forward"), hooks)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        content = hash(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        seen[f"tensor {name}"] = (id(tensor), tensor.dtype, tensor.requires_grad, content)
    if hasattr(model, "config"):
        seen["config"] = tuple(sorted((key, repr(value)) for key, value in model.config.to_dict().items()))
    return seen


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


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
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


def test_unpatch_restores_the_same_objects(family):
    model = tiny_model(family)
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *args: None)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
    model.train()
    model.model.layers[2].eval()
    before, expected = snapshot(model), logits(model)
    handle = patch(model, CONFIGS["both"])
    assert snapshot(model) != before
    randomize(handle)
    loss(model).backward()
    assert handle.unpatch() is model
    assert snapshot(model) == before
    assert handle_of(model) is None
    assert torch.equal(logits(model), expected)


def test_unpatch_twice_is_refused(llama):
    handle = patch(llama, CONFIGS["both"])
    handle.unpatch()
    before = snapshot(llama)
    for end in (handle.unpatch, handle.merge):
        with pytest.raises(ValueError, match="this handle has ended"):
            end()
    assert snapshot(llama) == before


def test_patch_again_after_unpatch(llama):
    base = logits(llama)
    for config in CONFIGS.values():
        handle = patch(llama, config)
        randomize(handle)
        assert not torch.equal(logits(llama), base)
        handle.unpatch()
        assert torch.equal(logits(llama), base)


def test_patch_wraps_adapted_layers_only(llama):
    untouched = llama.model.layers[1].self_attn.o_proj
    handle = patch(llama, LofitConfig(offset=[(2, 1), (0, 3)]))
    assert handle_of(llama) is handle
    assert list(handle.layers) == [0, 2]
    assert llama.model.layers[1].self_attn.o_proj is untouched
    assert isinstance(llama.model.layers[0].self_attn.o_proj, LofitLinear)
    assert llama.model.layers[0].self_attn.o_proj is handle.layers[0]


@pytest.mark.parametrize("training", [False, True])
def test_patch_keeps_the_training_mode(llama, training):
    llama.train(training)
    patch(llama, CONFIGS["both"])
    assert {m.training for m in llama.modules()} == {training}


REFUSED = {
    "no_model": (lambda: nn.Sequential(nn.Linear(4, 4)), CONFIGS["both"], TypeError, "Hugging Face model"),
    "unknown_model": (gpt2, LofitConfig(scale="all"), ValueError, "GPT2LMHeadModel.*not supported"),
    "head_beyond": (None, LofitConfig(offset=[(0, 1), (1, HEADS)]), ValueError, r"offset names heads.*\[\(1, 4\)\]"),
    "layer_beyond": (None, LofitConfig(scale=[(LAYERS, 0)]), ValueError, r"scale names.*\(3, 0\).*layers up to 2"),
    "no_config": (None, {"scale": "all"}, TypeError, "expected a LofitConfig, got dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_patch_refused_leaves_the_model(case):
    build, config, error, message = REFUSED[case]
    model = (build or (lambda: tiny_model("llama")))()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        patch(model, config)
    assert snapshot(model) == before
    assert handle_of(model) is None


@pytest.mark.parametrize("heads", [[], [(0, 1), (0, 1)], [3], [(0, 1, 2)], "every", [(0, -1)]])
def test_patch_with_a_refused_config_leaves_the_model(llama, heads):
    before = snapshot(llama)
    with pytest.raises((ValueError, TypeError), match="offset"):
        patch(llama, LofitConfig(offset=heads))
    assert snapshot(llama) == before


def test_patch_of_a_patched_model_is_refused(llama):
    handle = patch(llama, CONFIGS["both"])
    before = snapshot(llama)
    with pytest.raises(ValueError, match="already patched"):
        patch(llama, CONFIGS["scale_all"])
    assert snapshot(llama) == before
    assert handle_of(llama) is handle


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
        assert all(layer.folded is None for layer in handle.layers.values())


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
    from lofit_fast import layer as layer_module

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


def test_parameters_are_in_order(llama):
    handle = patch(llama, CONFIGS["both"])
    names = [name for name, _ in handle.named_parameters()]
    assert names == ["0.scale", "0.offset", "1.scale", "1.offset", "2.offset"]
    assert [id(p) for p in handle.parameters()] == [id(p) for _, p in handle.named_parameters()]
    rows = [1, 1, 2, 2, 1]
    assert [tuple(p.shape) for p in handle.parameters()] == [(n, HEAD_DIM) for n in rows]
    assert handle.n_parameters() == sum(rows) * HEAD_DIM
    assert handle.layers[1].heads("offset") == [0, 3]
    assert [p for p in llama.parameters() if p.requires_grad] == list(handle.parameters())


def test_parameters_do_not_depend_on_the_order_of_heads():
    first, second = (patch(tiny_model("llama"), LofitConfig(offset=heads)) for heads in (SOME, SOME[::-1]))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    "cast, dtype",
    [
        (lambda m: m.to(torch.bfloat16), torch.float32),
        (lambda m: m.half(), torch.float32),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.double().bfloat16(), torch.float32),
        (lambda m: m.double().float(), torch.float32),
    ],
)
def test_parameters_stay_wide_when_the_model_is_cast(llama, cast, dtype):
    handle = patch(llama, CONFIGS["both"])
    before = [p.detach().clone() for p in handle.parameters()]
    cast(llama)
    assert {p.dtype for p in handle.parameters()} == {dtype}
    assert all(torch.equal(a.float(), b) for a, b in zip(handle.parameters(), before, strict=True))
    loss(llama).backward()
    assert all(p.grad.dtype == dtype for p in handle.parameters())


def test_seeds_decide_the_first_vectors():
    def start(seed: int, std: float = 1e-3) -> Tensor:
        handle = patch(tiny_model("llama"), LofitConfig(scale="all", init_std=std, seed=seed))
        return torch.cat([p.detach().flatten() for p in handle.parameters()])

    first = start(1)
    torch.manual_seed(99)
    assert torch.equal(start(1), first)
    assert not torch.equal(start(2), first)
    # 192 numbers: the standard deviation is known to 1 / sqrt(2 x 192) = 5 %, four of those are allowed
    assert first.std() == pytest.approx(1e-3, rel=0.2)
    torch.testing.assert_close(start(1, std=1e-2), 10 * first)


def test_patch_leaves_the_global_generator_alone(llama):
    state = torch.get_rng_state()
    patch(llama, CONFIGS["both"])
    assert torch.equal(torch.get_rng_state(), state)


def test_state_dict_is_the_bases(family):
    model = tiny_model(family)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    handle = patch(model, CONFIGS["both"])
    randomize(handle)
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_into_a_patched_model(family, assign):
    model, other = tiny_model(family), tiny_model(family, seed=3)
    handle = patch(model, CONFIGS["both"])
    result = model.load_state_dict(other.state_dict(), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with handle.disabled():
        assert torch.equal(logits(model), logits(other))


def test_load_state_dict_strict_still_refuses(llama):
    patch(llama, CONFIGS["both"])
    state = llama.state_dict()
    key = "model.layers.0.self_attn.o_proj.weight"
    weight = state.pop(key)
    with pytest.raises(RuntimeError, match="Missing key"):
        llama.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        llama.load_state_dict({**state, key: weight, f"{key}s": weight})


def test_save_pretrained_of_a_patched_model_is_the_base(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    base = logits(model)
    randomize(patch(model, CONFIGS["both"]))
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again.eval()), base)


def test_patched_model_can_be_copied(llama):
    handle = patch(llama, CONFIGS["both"])
    randomize(handle)
    expected = logits(llama)
    twin = copy.deepcopy(llama)
    randomize(handle, seed=8)
    assert handle_of(twin) is not handle
    assert torch.equal(logits(twin), expected)
    assert handle_of(twin).unpatch() is twin
    assert handle_of(llama) is handle


def test_patched_model_generates(llama):
    handle = patch(llama, CONFIGS["both"])
    randomize(handle)
    prompt = tokens(length=4)
    given = {"max_new_tokens": 5, "do_sample": False}
    expected = llama.generate(prompt, **given)
    with handle.folded():
        assert torch.equal(llama.generate(prompt, **given), expected)
    step = prompt
    for _ in range(expected.shape[1] - prompt.shape[1]):
        step = torch.cat((step, llama(step).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(step[0], expected[0]) or 2 in expected[0]
