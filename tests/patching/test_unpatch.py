"""The objects of a patched model against themselves: what is put in, taken out, refused, saved and copied."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lofit_fast import LofitConfig, handle_of, patch
from lofit_fast.patching.layer import LofitLinear
from tests.oracle import randomize
from tests.patched_models import CONFIGS, SOME, logits, loss, snapshot
from tests.tiny_families import tiny_family
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model, tokens


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
    "unknown_model": (lambda: tiny_family("mamba2"), CONFIGS["scale_all"], ValueError, "Mamba2ForC.* not supported"),
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


def test_patch_of_nothing_says_what_it_got():
    with pytest.raises(TypeError, match="expected a model to patch, got NoneType"):
        patch(None, CONFIGS["both"])
