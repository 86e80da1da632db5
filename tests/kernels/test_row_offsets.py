"""Rows of a table added to the rows of a batch, against float64 and autograd's own."""

import pytest
import torch

from lofit_kernels.row_offsets import add_row_offsets
from tests.accuracy_rule import check

INDEX = torch.tensor([2, 0, 1, 2])


def inputs(dtype=torch.float32, wide=torch.float32):
    y, table = torch.randn(4, 5, 24).to(dtype), 0.1 * torch.randn(3, 24, dtype=wide)
    return y, table, torch.rand(4, 5, 1) < 0.5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_offsets_are_rounded_once(dtype, masked):
    y, table, mask = inputs(dtype)
    mask = mask if masked else None
    acting = 1 if mask is None else mask
    exact = y.double() + acting * table.double()[INDEX][:, None]
    once = exact.to(dtype)
    before = y.clone()
    got = add_row_offsets(y, table, INDEX, mask)
    assert torch.equal(y, before)
    check(got, exact, once)
    assert torch.equal(add_row_offsets(y.clone(), table, INDEX, mask, inplace=True), got)
    graph = add_row_offsets(y.clone().requires_grad_(), table, INDEX, mask)
    assert torch.equal(graph, got)


@pytest.mark.parametrize("index", [INDEX, torch.tensor([1])])
@pytest.mark.parametrize("masked", [False, True])
def test_row_offsets_gradients(index, masked):
    y, table, mask = inputs(torch.float64, torch.float64)
    y, table = y[..., :3].clone().requires_grad_(), table[:, :3].clone().requires_grad_()
    mask = mask if masked else None
    assert torch.autograd.gradcheck(lambda y, t: add_row_offsets(y, t, index, mask), (y, table))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_offsets_sums_of_gradients_are_not_rounded_to_16_bits(dtype):
    y, table, _ = inputs(dtype)
    table.requires_grad_()
    dy = torch.randn(4, 5, 24).to(dtype)
    (got,) = torch.autograd.grad(add_row_offsets(y, table, INDEX), table, dy)
    exact = torch.zeros(3, 24, dtype=torch.float64).index_add_(0, INDEX, dy.double().sum(1))
    check(got, exact, torch.zeros(3, 24).index_add_(0, INDEX, dy.float().sum(1)))


def test_row_offsets_compile(dynamo):
    y, table, mask = inputs()
    run = torch.compile(add_row_offsets, backend="eager", fullgraph=True)
    assert torch.equal(run(y, table, INDEX, mask), add_row_offsets(y, table, INDEX, mask))


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 5, 1), (1, 1, 1)])
def test_row_offsets_take_one_mask_for_all_rows_or_tokens(shape):
    y, table, _ = inputs()
    mask = torch.rand(shape) < 0.5
    whole = add_row_offsets(y, table, INDEX, mask.expand(4, 5, 1))
    assert torch.equal(add_row_offsets(y, table, INDEX, mask), whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": torch.zeros(3)}, "expected floating y"),
        ({"table": torch.zeros(3, 23)}, r"expected a table \(A, 24\)"),
        ({"table": torch.zeros(3, 24, dtype=torch.float64)}, "expected a table in torch.float32"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"expected an index \(1,\) or \(4,\)"),
        ({"index": torch.zeros(4, dtype=torch.int32)}, "got torch.int32"),
        ({"mask": torch.ones(4, 5, 1)}, "expected a mask of bools"),
        ({"mask": torch.ones(2, 5, 1) > 0}, r"a mask of shape \(4, 5, 1\), or 1 in its place, got \(2, 5, 1\)"),
        ({"mask": torch.ones(4, 6, 1) > 0}, r"a mask of shape \(4, 5, 1\)"),
        ({"y": torch.zeros(1, 5, 24), "index": torch.tensor([1])}, r"a mask of shape \(1, 5, 1\), .* got \(4, 5, 1\)"),
    ],
)
def test_row_offsets_refuse_what_does_not_fit(changed, message):
    y, table, mask = inputs()
    with pytest.raises((TypeError, ValueError), match=message):
        add_row_offsets(**{"y": y, "table": table, "index": INDEX, "mask": mask, **changed})
