"""One projection whose vectors act on some tokens: values and gradients against plain arithmetic in float64."""

import copy
import threading

import pytest
import torch
from torch import nn

from lofit_fast.patching.acting import Acting, said
from lofit_fast.patching.layer import LofitLinear
from tests.accuracy_rule import check

H, D, N, B, S = 4, 8, 40, 2, 30
K = H * D
COMPONENTS = {"scale": ([0, 2], None), "offset": (None, [1, 2, 3]), "both": ([0, 2], [1, 2, 3])}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Doubling(nn.Linear):
    """A subclass with a forward of its own, as quantized linears are."""

    def forward(self, z):
        return 2 * super().forward(z)


def wrapped(components="both", dtype=torch.float64, base=None, bias=True) -> LofitLinear:
    torch.manual_seed(0)
    layer = LofitLinear(base or nn.Linear(K, N, bias=bias), H, D, *COMPONENTS[components]).to(dtype)
    layer.inner.requires_grad_(False)
    layer.acting = Acting()
    with torch.no_grad():
        for vectors in layer.parameters(recurse=False):
            vectors.normal_(0, 0.5)
    return layer


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, 3:] = mask[1, 7:] = True
    return torch.randn(B, S, K).to(dtype), mask, torch.randn(B, S, N).to(dtype)


def natural(layer, z, mask, dtype, times=1, backwards=False):
    """z -> (1 + a) z + v where the mask is true, then the projection, in a dtype; and leaves for the gradients.

    backwards: sum over the columns of z, and over tokens, in the other order.
    """
    leaves = [z.detach().to(dtype).requires_grad_()]
    edited = leaves[0].unflatten(-1, (H, D))
    for component in ("scale", "offset"):
        rows = getattr(layer, component)
        if rows is not None:
            rows = rows.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
            leaves.append(rows)
            dense = rows.new_zeros(H, D).index_copy(0, torch.tensor(layer.heads(component)), rows)
            edited = edited * (1 + dense) if component == "scale" else edited + dense
    edited = torch.where(mask[..., None], edited.flatten(-2).to(dtype), leaves[0])
    bias = None if layer.inner.bias is None else layer.inner.bias.to(dtype)
    weight = layer.inner.weight.to(dtype)
    if backwards:
        edited, weight = edited.flip(0, 1, 2), weight.flip(1)
    y = times * nn.functional.linear(edited, weight, bias)
    return y.flip(0, 1) if backwards else y, leaves


def graded(y, leaves, dy):
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("components", COMPONENTS)
def test_values_and_gradients_are_within_the_accuracy_rule(components, dtype, bias):
    layer, (z, mask, dy) = wrapped(components, dtype, bias=bias), inputs(dtype)
    z.requires_grad_()
    with layer.acting.during(mask):
        got = graded(layer(z), [z, *layer.parameters(recurse=False)], dy)
    exact = graded(*natural(layer, z, mask, torch.float64), dy)
    eager = [graded(*natural(layer, z, mask, dtype, backwards=order), dy) for order in (False, True)]
    for mine, expected, *theirs in zip(got, exact, *eager, strict=True):
        check(mine, expected, *theirs)


@pytest.mark.parametrize("components", COMPONENTS)
def test_a_base_that_is_not_plain_is_called_once_on_edited_tokens(components):
    layer, (z, mask, dy) = wrapped(components, base=Doubling(K, N)), inputs()
    calls = []
    layer.inner.register_forward_hook(lambda *_: calls.append(None))
    z.requires_grad_()
    with layer.acting.during(mask):
        got = graded(layer(z), [z, *layer.parameters(recurse=False)], dy)
    for mine, expected in zip(got, graded(*natural(layer, z, mask, torch.float64, times=2), dy), strict=True):
        assert torch.allclose(mine, expected, atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("components", COMPONENTS)
def test_gradcheck(components):
    layer, (z, mask, _) = wrapped(components), inputs()
    vectors = [p.detach().clone().requires_grad_() for p in layer.parameters(recurse=False)]
    names = [name for name, _ in layer.named_parameters(recurse=False)]

    def run(z, *vectors):
        with layer.acting.during(mask):
            return torch.func.functional_call(layer, dict(zip(names, vectors, strict=True)), (z,))

    small = z[:1, :4].clone().requires_grad_()
    mask = mask[:1, :4]
    assert torch.autograd.gradcheck(run, (small, *vectors))


@pytest.mark.parametrize("components", COMPONENTS)
@pytest.mark.parametrize("grad", [True, False])
def test_everywhere_is_the_layer_of_all_positions_bit_for_bit(components, grad):
    layer, (z, *_) = wrapped(components, torch.float32), inputs(torch.float32)
    with torch.set_grad_enabled(grad):
        with layer.acting.during("all"):
            got = layer(z)
        layer.acting = None
        assert torch.equal(got, layer(z))


@pytest.mark.parametrize("components", COMPONENTS)
def test_without_gradients_and_folded_it_is_the_same(components):
    layer, (z, mask, _) = wrapped(components), inputs()
    expected, _ = natural(layer, z, mask, torch.float64)
    with torch.no_grad(), layer.acting.during(mask):
        assert torch.allclose(layer(z), expected, atol=1e-12)
        with layer.scopes.folded([layer]):
            assert torch.allclose(layer(z), expected, atol=1e-12)


def test_rows_end_to_end_take_the_mask_end_to_end():
    layer, (z, mask, _) = wrapped(), inputs()
    with layer.acting.during(mask):
        assert torch.equal(layer(z.flatten(0, 1)), layer(z).flatten(0, 1))


def test_a_mask_of_other_tokens_is_refused_and_so_is_none():
    layer, (z, mask, _) = wrapped(), inputs()
    with layer.acting.during(mask[:, 1:]), pytest.raises(ValueError, match=r"\(2, 29\), expected one of \(2, 30\)"):
        layer(z)
    with pytest.raises(ValueError, match="does not say where the answer begins"):
        layer(z)
    with layer.scopes.disabled():
        assert torch.equal(layer(z), layer.inner(z))


def test_autocast_gives_what_the_projection_gives():
    layer, (z, mask, _) = wrapped("offset", torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), layer.acting.during(mask):
        y = layer(z)
    assert y.dtype == torch.bfloat16
    check(y.detach(), natural(layer, z, mask, torch.float64)[0].detach(), natural(layer, z, mask, torch.bfloat16)[0])


@pytest.mark.parametrize("components", [pytest.param("scale", marks=pytest.mark.slow), "offset"])
def test_compiled_layers_read_each_forwards_mask_in_one_graph(components):
    layer, (z, mask, dy) = wrapped(components, torch.float32), inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for where in (mask, ~mask, "all", mask):
        parameters = list(layer.parameters(recurse=False))
        with layer.acting.during(where):
            for got, expected in zip(
                graded(compiled(z), parameters, dy), graded(layer(z), parameters, dy), strict=True
            ):
                assert torch.allclose(got, expected, atol=1e-5)


def test_threads_have_masks_of_their_own():
    layer, (z, mask, _) = wrapped(), inputs()
    found, entered, done = {}, threading.Event(), threading.Event()

    def other():
        with layer.acting.during("all"):
            entered.set()
            done.wait(10)
            found["other"] = layer(z)

    thread = threading.Thread(target=other)
    with layer.acting.during(mask):
        thread.start()
        entered.wait(10)
        found["here"] = layer(z)
        done.set()
        thread.join()
    with layer.acting.during(mask):
        assert torch.equal(found["here"], layer(z))
    with layer.acting.during("all"):
        assert torch.equal(found["other"], layer(z))


def test_a_copy_has_forwards_of_its_own():
    layer = nn.ModuleList([wrapped()])
    with layer[0].acting.during("all"):
        copied = copy.deepcopy(layer)
        assert copied[0].acting is not layer[0].acting
        assert copied[0].acting.mask is None
    assert "on answers alone" in repr(layer)


@pytest.mark.parametrize("mask", ["all", torch.ones(B, S, dtype=torch.bool)])
def test_a_mask_is_no_replica_s(mask):
    # its thread is not in the scope, and would go by the labels of its part of the batch
    layer = wrapped()
    with said(layer.acting, mask), pytest.raises(ValueError, match="expected no handle.acting_on"):
        layer._replicate_for_data_parallel()
    assert layer._replicate_for_data_parallel().acting is layer.acting
