"""W v of many layers at once, as the public function has it: values, gradients, refusals, compiled and not."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lofit_kernels import fold_offset, fold_offsets, head_affine_linear, ops, reference
from lofit_kernels.layer_fold import LayerFold

D = 8
# of each layer: N, number of heads, those selected
LAYERS = [(12, 4, [0, 2]), (12, 4, [3]), (12, 2, [0, 1]), (20, 4, [1, 2])]


def make(dtype=torch.float32, layers=LAYERS, device="cpu"):
    """weights (N, K), offsets (h, D) that require grad, heads."""
    wide = torch.promote_types(dtype, torch.float32)
    weights = [torch.randn(N, H * D).to(device, dtype) for N, H, _ in layers]
    offsets = [torch.randn(len(listed), D, dtype=wide).to(device).requires_grad_() for *_, listed in layers]
    return weights, offsets, [torch.tensor(listed, device=device) for *_, listed in layers]


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_offsets_is_fold_offset_of_each(dtype, backend, request):
    # ATen computes wherever the tensors are
    weights, offsets, heads = make(dtype, device=request.getfixturevalue("device") if backend == "triton" else "cpu")
    found = fold_offsets(weights, offsets, heads, backend=backend)
    grads = [torch.randn_like(folded) for folded in found]
    torch.autograd.backward(found, grads)
    for folded, weight, offset, listed, grad in zip(found, weights, offsets, heads, grads, strict=True):
        wide = fold_offset(weight.double(), offset.detach().double(), listed)
        torch.testing.assert_close(folded.double(), wide, rtol=1e-5, atol=1e-5)
        columns = weight.double().unflatten(1, (-1, D))[:, listed].flatten(1)
        torch.testing.assert_close(offset.grad.double(), (grad.double() @ columns).view(-1, D), rtol=1e-5, atol=1e-5)
        # in the kernel as in ATen, whoever else is in the group
        alone = fold_offsets([weight], [offset], [listed], backend=backend)[0]
        assert torch.equal(alone, folded)


def test_fold_offsets_gradcheck():
    weights, offsets, heads = make(torch.float64)
    assert torch.autograd.gradcheck(lambda *v: tuple(fold_offsets(weights, v, heads)), offsets)


def test_fold_offsets_and_projection_gradcheck():
    weights, offsets, heads = make(torch.float64, LAYERS[:2])
    z = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)

    def run(z, scale, bias, *offsets):
        folded = fold_offsets(weights, offsets, heads)
        first = head_affine_linear(z, weights[0], bias, scale=scale, folded=folded[0])
        return first + head_affine_linear(z, weights[1], folded=folded[1])

    assert torch.autograd.gradcheck(run, (z, scale, bias, *offsets))
    expected = reference.affine_linear(z, weights[0], bias, scale, torch.arange(4), offsets[0], heads[0])
    expected = expected + reference.affine_linear(z, weights[1], None, None, None, offsets[1], heads[1])
    torch.testing.assert_close(run(z, scale, bias, *offsets), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_gradient_is_the_offsets_own_to_the_bit(dtype):
    weights, offsets, heads = make(dtype, LAYERS[:1])
    z = torch.randn(5, 32).to(dtype)
    given = {"offset": offsets[0], "offset_heads": heads[0]}
    folded = fold_offsets(weights, offsets, heads)[0]
    assert folded.dtype == torch.float32
    results = head_affine_linear(z, weights[0], folded=folded), head_affine_linear(z, weights[0], **given)
    assert torch.equal(*results)
    grad = torch.randn_like(results[0])
    assert torch.equal(*(torch.autograd.grad(y, offsets[0], grad)[0] for y in results))


def test_fold_offsets_saves_nothing_and_runs_backward_twice():
    weights, offsets, heads = make()
    saved = []
    with saved_tensors_hooks(saved.append, lambda x: x):
        first, second, *_ = fold_offsets(weights, offsets, heads)
    assert saved == []
    # as nested backwards of reentrant checkpoints do, each through its own layer
    first.sum().backward()
    assert offsets[1].grad is None
    second.sum().backward()
    assert offsets[0].grad is not None and offsets[1].grad is not None and offsets[2].grad is None


def test_what_a_caller_does_to_its_lists_afterwards_changes_no_gradient():
    weights, offsets, heads = make(layers=LAYERS[:2])
    first, second = fold_offsets(weights, offsets, heads)
    expected = weights[0].sum(0).view(4, D)[LAYERS[0][2]]
    weights[0] = torch.zeros_like(weights[0])
    heads.clear()
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(offsets[0].grad, expected)


def test_grouped_fold_opcheck():
    weights, offsets, heads = make(layers=LAYERS[:3])
    args = (weights, offsets, heads, "aten")
    assert set(torch.library.opcheck(ops.grouped_fold, args).values()) == {"SUCCESS"}
    args = (torch.randn(3, 12), weights, heads, D, "aten")
    assert set(torch.library.opcheck(ops.grouped_fold_backward, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("needs", [(False, False, True, False, False, True), (True, False, False, False, False, True)])
def test_affine_linear_opcheck_folded_with_a_graph(needs):
    z, weight, bias = torch.randn(2, 3, 32), torch.randn(12, 32), torch.randn(12)
    inputs = (z.requires_grad_(needs[0]), weight, bias.requires_grad_(needs[2]), None, None, None, None)
    args = (*inputs, torch.randn(12, requires_grad=True), "fold", "aten")
    assert set(torch.library.opcheck(ops.affine_linear, args).values()) == {"SUCCESS"}


def test_fold_offsets_compiles_whole(dynamo):
    weights, offsets, heads = make()

    def run(*offsets):
        return torch.cat(fold_offsets(weights, offsets, heads))

    y, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*offsets), run(*offsets)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    got, wanted = torch.autograd.grad(y, offsets, grad), torch.autograd.grad(expected, offsets, grad)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_fold_offsets_of_none():
    assert fold_offsets([], []) == []


def test_the_same_layers_again_are_refused_where_a_weight_is_trained_by_now():
    layers = list(zip(*make(layers=LAYERS[:2]), strict=True))
    fold = LayerFold()
    expected = [folded.exact for folded in fold(layers)]
    layers[1][0].requires_grad_()
    for _ in range(2):
        with pytest.raises(ValueError, match="expected frozen ones, got one that requires it"):
            fold(layers)
        # nor does what was seen without a graph count with one
        with torch.no_grad():
            assert all(torch.equal(f.exact, e) for f, e in zip(fold(layers), expected, strict=True))
    layers[1][0].requires_grad_(False)
    assert all(torch.equal(f.exact, e) for f, e in zip(fold(layers), expected, strict=True))


def test_fold_offsets_refuses():
    weights, offsets, heads = make()
    with pytest.raises(ValueError, match="got 4 weights, 3 offsets"):
        fold_offsets(weights, offsets[:3], heads)
    with pytest.raises(ValueError, match="frozen ones"):
        fold_offsets([weights[0].requires_grad_()], offsets[:1], heads[:1])
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(3, 8\)"):
        fold_offsets([torch.zeros(3, 8, dtype=torch.int64)], offsets[:1], heads[:1])
    with pytest.raises(TypeError, match="offset in torch.float32"):
        fold_offsets([weights[1]], [offsets[1].detach().bfloat16()], heads[1:2])
    with pytest.raises(TypeError, match="folded in torch.float32"):
        head_affine_linear(torch.randn(3, 32), weights[1], folded=torch.zeros(12, dtype=torch.float64))
