"""The accuracy rule itself: what it allows, that sums are judged by several orders, and that faults still show."""

import pytest
import torch

from lofit_kernels import head_affine_linear, reference
from lofit_kernels.error_bound import ORDERS, allowed_error, bound_of, largest_error, orders
from tests.kernels.op_inputs import doubled, eager, eager_in_orders, gradients, make

SUMS = ["scale", "offset", "bias"]


def judged(dtype, seed=0, T=45, drop=None):
    """name -> (sums of the op, exact ones, eager in several orders of each). drop: a row that the op does not get."""
    torch.manual_seed(seed)
    inputs = make("both_different", dtype, D=12, rows=(T,))
    for name in SUMS:
        inputs[name].requires_grad_()
    grad = torch.randn(T, inputs["weight"].shape[0]).to(dtype)
    expected = reference.affine_linear_backward(grad.double(), **doubled(inputs))
    eagerly = eager_in_orders(eager, inputs, SUMS, grad)
    kept = [t for t in range(T) if t != drop]
    y = head_affine_linear(**{**inputs, "z": inputs["z"][kept]})
    got = gradients(y, inputs, SUMS, grad[kept])
    return {name: (got[name], getattr(expected, name), eagerly[name]) for name in SUMS}


def test_allowed_error_is_twice_the_largest_of_eager():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    near, far = (exact.float() + shift for shift in (2.0**-12, 2.0**-10))
    assert allowed_error(exact, near) == 2 * 2.0**-12
    assert allowed_error(exact, near, far) == allowed_error(exact, far, near) == 2 * 2.0**-10


@pytest.mark.parametrize("largest, expected", [(1.0, 2**-7), (1.99, 2**-7), (4.0, 2**-5), (0.0, 0.0)])
def test_allowed_error_is_one_ulp_at_least(largest, expected):
    exact = torch.tensor([largest, 0.0], dtype=torch.float64)
    assert bound_of(0.0, exact.abs().max().item(), torch.bfloat16) == expected
    # rounding alone errs by half of that
    assert allowed_error(exact, exact.bfloat16()) == expected


def test_allowed_error_of_nothing():
    assert allowed_error(torch.empty(0, 3, dtype=torch.float64), torch.empty(0, 3)) == 0
    assert largest_error(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)) == 0


def test_allowed_error_refuses():
    exact = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(TypeError, match="expected the exact result in torch.float64, got torch.float32"):
        allowed_error(exact.float(), exact.float())
    with pytest.raises(ValueError, match=r"of shape \(2,\), got none"):
        allowed_error(exact)
    with pytest.raises(ValueError, match=r"of one dtype.*got torch.float32 \(2,\), torch.float16 \(2,\)"):
        allowed_error(exact, exact.float(), exact.half())
    with pytest.raises(ValueError, match=r"of shape \(2,\), got torch.float32 \(3,\)"):
        allowed_error(exact, torch.zeros(3))


def test_orders_are_permutations_and_always_the_same():
    found, again = orders(7, 5), orders(7, 5)
    assert len(found) == ORDERS
    assert [x.tolist() for x in found[0]] == [list(range(7)), list(range(5))]
    for row, same in zip(found, again, strict=True):
        assert [sorted(x.tolist()) for x in row] == [list(range(7)), list(range(5))]
        assert all(torch.equal(x, y) for x, y in zip(row, same, strict=True))
    assert len({tuple(t.tolist()) for t, _ in found}) == ORDERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_sum_passes_for_any_seed(dtype):
    for seed in range(20):
        for name, (got, exact, eagerly) in judged(dtype, seed).items():
            assert largest_error(got, exact) <= allowed_error(exact, *eagerly), (seed, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_that_is_one_percent_off_fails(dtype):
    for name, (got, exact, eagerly) in judged(dtype).items():
        assert largest_error(1.01 * got, exact) > allowed_error(exact, *eagerly), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [0, 44])
def test_a_sum_without_one_row_fails(dtype, row):
    for name, (got, exact, eagerly) in judged(dtype, drop=row).items():
        assert largest_error(got, exact) > allowed_error(exact, *eagerly), name
