"""LofitLinear around one projection: what it computes, whom it lets be heard, what it shows of itself."""

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize

from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.plain_linear import is_plain_linear
from lofit_kernels import reference

H, D, N = 4, 8, 12
K = H * D
SCALE_HEADS, OFFSET_HEADS = [0, 2], [1, 2, 3]
COMPONENTS = {
    "scale": (SCALE_HEADS, None),
    "offset": (None, OFFSET_HEADS),
    "both": (SCALE_HEADS, OFFSET_HEADS),
}


class Doubling(nn.Linear):
    """A subclass with a forward of its own, as quantized linears are."""

    def forward(self, z):
        return 2 * super().forward(z)


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 1


def wrap(base=None, components="both", dtype=torch.float64, std=0.5) -> LofitLinear:
    layer = LofitLinear(base or nn.Linear(K, N), H, D, *COMPONENTS[components]).to(dtype)
    with torch.no_grad():
        for vectors in layer.parameters(recurse=False):
            vectors.normal_(0, std)
    return layer


def inputs(layer: LofitLinear) -> dict:
    return {
        "scale": layer.scale,
        "scale_heads": layer.scale_heads,
        "offset": layer.offset,
        "offset_heads": layer.offset_heads,
    }


@pytest.fixture
def z():
    return torch.randn(2, 5, K, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("components", COMPONENTS)
def test_layer_computes_the_definition(components, bias, z):
    layer = wrap(nn.Linear(K, N, bias=bias), components)
    expected = reference.affine_linear(z, layer.weight, layer.bias, **inputs(layer))
    torch.testing.assert_close(layer(z), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("components", COMPONENTS)
def test_layer_around_a_module_that_is_not_plain_gives_it_the_affine_heads(components, z):
    layer = wrap(Doubling(K, N), components)
    expected = 2 * reference.affine_linear(z, layer.weight, layer.bias, **inputs(layer))
    torch.testing.assert_close(layer(z), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", ["pass", "delta"])
def test_layer_insists_on_a_form(form):
    layer = wrap(components="scale", dtype=torch.bfloat16)
    torch.nn.init.constant_(layer.scale, 1e-3)
    z = torch.randn(64, K).bfloat16()
    layer.form = form
    # so small a scale is lost in the pass, and only there
    assert torch.equal(layer(z), layer.inner(z)) == (form == "pass")


@pytest.mark.parametrize("base", [nn.Linear, Doubling])
def test_layer_disabled_is_the_base(base, z):
    layer = wrap(base(K, N))
    with layer.scopes.disabled():
        assert torch.equal(layer(z), layer.inner(z))


def plain() -> nn.Linear:
    return nn.Linear(K, N)


def with_override() -> nn.Linear:
    linear = plain()
    linear.forward = lambda z: nn.functional.linear(z, linear.weight) * 3
    return linear


def with_hook(register: str) -> nn.Linear:
    linear = plain()
    getattr(linear, register)(lambda *args: None)
    return linear


def with_weight(make) -> nn.Linear:
    linear = plain()
    weight = make(linear.weight.detach())
    del linear.weight
    linear.weight = weight
    return linear


def parametrized() -> nn.Linear:
    linear = plain()
    parametrize.register_parametrization(linear, "weight", Shifted())
    return linear


class Traced(torch.Tensor):
    """A weight that answers for itself, as quantized and distributed ones do."""


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
NOT_PLAIN = {
    **{hook: lambda hook=hook: with_hook(f"register_{hook}") for hook in HOOKS},
    "subclass": lambda: Doubling(K, N),
    "forward_override": with_override,
    "parametrized": parametrized,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(plain()),
    "integer_weight": lambda: with_weight(lambda w: nn.Parameter(w.to(torch.int8), requires_grad=False)),
    "sparse_weight": lambda: with_weight(lambda w: nn.Parameter(w.to_sparse())),
    "weight_subclass": lambda: with_weight(lambda w: w.as_subclass(Traced)),
    "no_linear": lambda: nn.Identity(),
}


def test_plain_linear_is_plain():
    assert is_plain_linear(plain())
    assert is_plain_linear(plain().requires_grad_(False).bfloat16())


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_not_plain_is_seen(kind):
    assert not is_plain_linear(NOT_PLAIN[kind]())


@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_global_hooks_are_seen(hook):
    remove = getattr(module_globals, f"register_module_{hook}")(lambda *args: None)
    try:
        assert not is_plain_linear(plain())
    finally:
        remove.remove()
    assert is_plain_linear(plain())


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_the_base_are_called(register, when, z):
    heard = []
    base = nn.Linear(K, N).double()

    def listen():
        return getattr(base, register)(lambda module, args, *output: heard.append(args[0]))

    remove = listen() if when == "before" else None
    layer = wrap(base)
    remove = remove or listen()
    y = layer(z)
    # what it hears is what the base is given: the affine heads
    assert len(heard) == 1
    torch.testing.assert_close(heard[0], reference.affine(z, **inputs(layer)), rtol=1e-13, atol=1e-13)
    remove.remove()
    torch.testing.assert_close(layer(z), y, rtol=1e-13, atol=1e-13)
    assert len(heard) == 1


def test_hooks_that_change_the_output_are_obeyed(z):
    layer = wrap()
    layer.inner.register_forward_hook(lambda module, args, output: -output)
    expected = -reference.affine_linear(z, layer.weight, layer.bias, **inputs(layer))
    torch.testing.assert_close(layer(z), expected, rtol=1e-13, atol=1e-13)


def test_forward_override_of_the_instance_is_obeyed(z):
    layer = wrap(with_override())
    expected = 3 * reference.affine_linear(z, layer.weight, None, **inputs(layer))
    torch.testing.assert_close(layer(z), expected, rtol=1e-13, atol=1e-13)


def test_parametrization_of_the_base_is_obeyed(z):
    layer = wrap(parametrized())
    expected = reference.affine_linear(z, layer.inner.weight, layer.bias, **inputs(layer))
    torch.testing.assert_close(layer(z), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("components", COMPONENTS)
def test_fold_computes_the_same(components, bias, z):
    layer = wrap(nn.Linear(K, N, bias=bias), components)
    expected = layer(z)
    with torch.no_grad(), layer.scopes.folded([layer]):
        assert (layer.here.kept is None) == (components == "scale")
        torch.testing.assert_close(layer(z), expected, rtol=1e-13, atol=1e-13)
    assert layer.here.kept is None


def test_fold_is_not_used_where_gradients_are(z):
    layer = wrap()
    with layer.scopes.folded([layer]), torch.enable_grad():
        layer.offset.data.add_(1)
        y = layer(z)
        torch.testing.assert_close(y, reference.affine_linear(z, layer.weight, layer.bias, **inputs(layer)))
        assert torch.autograd.grad(y.sum(), layer.offset)[0].abs().sum() > 0


def test_fold_ends_with_an_exception():
    layer = wrap()
    with pytest.raises(RuntimeError, match="inside"), layer.scopes.folded([layer]):
        raise RuntimeError("inside")
    assert layer.here.kept is None


def test_fold_of_what_is_not_plain_folds_nothing(z):
    layer = wrap(Doubling(K, N))
    expected = layer(z)
    with torch.no_grad(), layer.scopes.folded([layer]):
        assert layer.here.kept is None
        assert torch.equal(layer(z), expected)


def test_layer_stands_in_for_its_base():
    base = nn.Linear(K, N)
    layer = wrap(base, dtype=torch.float32)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (K, N)
    assert wrap(nn.Linear(K, N, bias=False)).bias is None


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_what_is_set_on_the_layer_is_set_on_its_base(part, z):
    """As code that prunes, ties or replaces weights does, which has never heard of LoFiT."""
    layer, other = wrap(), nn.Linear(K, N).double()
    layer(z)
    setattr(layer, part, getattr(other, part))
    assert getattr(layer.inner, part) is getattr(other, part)
    expected = reference.affine_linear(z, layer.inner.weight, layer.inner.bias, **inputs(layer))
    torch.testing.assert_close(layer(z), expected)
    with torch.no_grad(), layer.scopes.folded([layer]), pytest.raises(ValueError, match=f"cannot set {part} inside"):
        setattr(layer, part, getattr(nn.Linear(K, N), part))
    assert getattr(layer.inner, part) is getattr(other, part)


def test_layer_state_dict_is_the_bases():
    layer = wrap()
    state, expected = layer.state_dict(), layer.inner.state_dict()
    assert list(state) == list(expected) == ["weight", "bias"]
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    parent = nn.ModuleDict({"o_proj": layer})
    assert list(parent.state_dict()) == ["o_proj.weight", "o_proj.bias"]


@pytest.mark.parametrize("assign", [False, True])
def test_layer_loads_the_bases_state(assign):
    layer, other = wrap(), nn.Linear(K, N).double()
    vectors = [v.clone() for v in layer.parameters(recurse=False)]
    for module, prefix in ((layer, ""), (nn.ModuleDict({"o_proj": layer}), "o_proj.")):
        state = {prefix + key: value for key, value in other.state_dict().items()}
        before = dict(state)
        result = module.load_state_dict(state, strict=True, assign=assign)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        # the caller's own dictionary is not rewritten
        assert state.keys() == before.keys()
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(recurse=False), vectors, strict=True))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_layer_refuses_a_wrong_state(change):
    layer = wrap()
    state = nn.Linear(K, N).state_dict()
    if change == "missing":
        del state["bias"]
    elif change == "unexpected":
        state["scale"] = torch.zeros(2, D)
    else:
        state["weight"] = torch.zeros(N, K + 1)
    with pytest.raises(RuntimeError, match="Error.* in loading state_dict"):
        layer.load_state_dict(state)


CASTS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16()": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
}
VECTOR_DTYPE = {"double": torch.float64}
BASE_DTYPE = {"bfloat16": torch.bfloat16, "half": torch.float16, "bfloat16()": torch.bfloat16, "double": torch.float64}


@pytest.mark.parametrize("first, second", list(combinations(CASTS, 2)) + list(combinations(reversed(CASTS), 2)))
def test_layer_vectors_stay_wide_through_casts(first, second):
    layer = wrap(dtype=torch.float32)
    before = [v.clone() for v in layer.parameters(recurse=False)]
    leaves = list(layer.parameters(recurse=False))
    for cast in (first, second):
        CASTS[cast](layer)
        assert layer.weight.dtype == BASE_DTYPE.get(cast, torch.float32)
        assert {layer.scale.dtype, layer.offset.dtype} == {VECTOR_DTYPE.get(cast, torch.float32)}
        assert layer.scale_heads.dtype == layer.offset_heads.dtype == torch.int64
    # not one bit is lost on the way, and an optimizer still holds the same parameters
    assert all(torch.equal(a.float(), b) for a, b in zip(layer.parameters(recurse=False), before, strict=True))
    assert all(a is b for a, b in zip(layer.parameters(recurse=False), leaves, strict=True))
    z = torch.randn(3, K).to(layer.weight.dtype)
    assert layer(z).dtype == z.dtype


def test_base_alone_goes_to_meta():
    """As accelerate sends it there, to bring it back by the keys of its state, which has none for the vectors."""
    layer = wrap(dtype=torch.float32)
    own = (layer.scale, layer.offset, layer.scale_heads, layer.offset_heads)
    before = [t.clone() for t in own]
    layer.to("meta")
    assert layer.weight.is_meta
    now = (layer.scale, layer.offset, layer.scale_heads, layer.offset_heads)
    assert all(map(torch.equal, now, before)) and now[:2] == own[:2]


def test_layer_on_a_bfloat16_base_starts_in_float32():
    layer = LofitLinear(nn.Linear(K, N).bfloat16(), H, D, [0], [1])
    assert {layer.scale.dtype, layer.offset.dtype} == {torch.float32}


def test_layer_says_what_is_adapted():
    assert "scale=2/4 heads, offset=3/4 heads" in repr(wrap())
    assert "offset" not in wrap(components="scale").extra_repr()
    assert wrap().heads("scale") == SCALE_HEADS
    assert wrap(components="offset").heads("scale") == []


def test_layer_refuses_heads_it_does_not_have():
    with pytest.raises(ValueError, match=r"\[0, 4\), got \[4\]"):
        LofitLinear(nn.Linear(K, N), H, D, [4], None)
