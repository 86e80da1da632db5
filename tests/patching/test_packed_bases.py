"""Bases without a weight, or with a packed one: the patched model equals a hook on the same modules."""

import copy

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.placement import device_of, dtype_of
from lofit_fast.patching.plain_linear import is_plain_linear
from tests.oracle import Hook, randomize, vectors_of
from tests.packed_linears import KINDS, STAND_INS, Float8Linear, cuts_gradients, packed_model
from tests.patched_models import CONFIGS, logits, loss, relative
from tests.tiny_models import tokens


@pytest.fixture(params=KINDS)
def packed(request):
    return packed_model(KINDS[request.param])


def patched(model):
    handle = lf.patch(model, CONFIGS["both"])
    randomize(handle)
    return handle


def test_packed_base_equals_a_hook(packed):
    hook_model = copy.deepcopy(packed)
    handle = patched(packed)
    hook = Hook(hook_model, vectors_of(handle))
    assert logits(hook_model).requires_grad
    assert relative(logits(packed), logits(hook_model)) < 1e-5
    loss(packed).backward()
    loss(hook_model).backward()
    for (layer, component), vectors in hook.parameters.items():
        assert relative(getattr(handle.layers[layer], component).grad, vectors.grad) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(logits(packed), logits(hook_model)) < 2e-2
    with handle.folded():
        assert relative(logits(packed), logits(hook_model)) < 1e-5
        options = {"max_new_tokens": 3, "do_sample": False}
        assert packed.generate(tokens(), **options).equal(hook_model.generate(tokens(), **options))
    # the vectors move it, so that agreement is worth something
    with handle.disabled():
        assert relative(logits(packed), logits(hook_model)) > 1e-2


def test_packed_base_is_saved_loaded_copied_and_given_back(packed, tmp_path):
    with torch.no_grad():
        before = logits(packed)
    modules = {name: id(module) for name, module in packed.named_modules()}
    names = list(packed.state_dict())
    handle = patched(packed)
    with torch.no_grad():
        expected = logits(packed)
        assert logits(copy.deepcopy(packed)).equal(expected)
    assert list(packed.state_dict()) == names
    handle.save(tmp_path)
    handle.unpatch()
    assert {name: id(module) for name, module in packed.named_modules()} == modules
    with torch.no_grad():
        assert logits(packed).equal(before)
        lf.load(packed, tmp_path)
        assert logits(packed).equal(expected)


def test_packed_base_without_a_weight_says_so():
    handle = patched(packed_model(STAND_INS["gptq-like"]))
    layer = handle.layers[1]
    assert not hasattr(layer, "weight") and not hasattr(layer, "bias")
    assert (layer.in_features, layer.out_features) == (64, 32)


@pytest.mark.parametrize("kind", ["gptq-like", "hqq-like", "bitsandbytes-4"])
def test_packed_base_in_float64(kind):
    model = packed_model(KINDS[kind], torch.float64)
    handle = lf.patch(model, CONFIGS["both"])
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.float64}


def test_gradients_that_a_base_cuts_off_are_an_error():
    model = packed_model(cuts_gradients)
    patched(model)
    with pytest.raises(ValueError, match="cannot train through a ForInference that gives no gradient"):
        loss(model)
    with torch.no_grad():
        logits(model)


def sparse(linear):
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)


def nested(linear):
    linear.weight = nn.Parameter(torch.nested.nested_tensor(list(linear.weight.detach())), requires_grad=False)


def whole_numbers(linear):
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


def float8(linear):
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def subclass(linear):
    class Marked(torch.Tensor):
        pass

    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Marked), requires_grad=False)


def subclass_bias(linear):
    class Marked(torch.Tensor):
        pass

    linear.bias = nn.Parameter(linear.bias.detach().as_subclass(Marked), requires_grad=False)


def fake(linear):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        linear.weight = nn.Parameter(torch.empty(2, 3))


def no_weight(linear):
    del linear.weight


@pytest.mark.parametrize(
    "change",
    [sparse, nested, whole_numbers, float8, subclass, subclass_bias, fake, no_weight],
    ids=lambda change: change.__name__,
)
def test_only_dense_numbers_are_a_plain_linear(change):
    linear = nn.Linear(3, 2)
    assert is_plain_linear(linear)
    change(linear)
    assert not is_plain_linear(linear)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_linears_are_not_plain(kind):
    assert not is_plain_linear(KINDS[kind](nn.Linear(64, 32, bias=False)))


def test_vectors_land_where_the_module_computes():
    """Parameters say it, then buffers and attributes, then what is around; fake tensors stand for a GPU's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    here, gpu = nn.Linear(2, 2), torch.device("cuda", 0)
    with FakeTensorMode():
        there, buffers, attributes = nn.Module(), nn.Module(), nn.Module()
        there.weight = nn.Parameter(torch.empty(2, device="cuda"))
        buffers.register_buffer("qweight", torch.empty(2, device="cuda"))
        attributes.packed = torch.empty(2, device="cuda")
    assert [device_of(m, here) for m in (there, buffers, attributes)] == [gpu] * 3
    assert device_of(nn.Module(), nn.Identity(), there, here) == gpu
    assert device_of(here, there) == torch.device("cpu")


def test_vectors_have_the_width_of_what_is_around():
    assert dtype_of(Float8Linear(nn.Linear(4, 4)), nn.Linear(2, 2).double()) == torch.float32
    assert dtype_of(STAND_INS["gptq-like"](nn.Linear(4, 4)), nn.Linear(2, 2).double()) == torch.float64
    layer = LofitLinear(STAND_INS["gptq-like"](nn.Linear(4, 4)), 2, 2, [0], [1], around=[nn.Linear(2, 2).double()])
    assert layer.scale.dtype == layer.offset.dtype == torch.float64


def test_buffers_on_meta_are_refused():
    model = packed_model(STAND_INS["gptq-like"])
    model.model.layers[1].self_attn.o_proj.to("meta")
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="meta device: load it first"):
        lf.patch(model, CONFIGS["both"])
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert any(parameter.requires_grad for parameter in model.parameters())
