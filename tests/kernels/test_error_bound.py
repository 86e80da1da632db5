"""The accuracy rule itself: what it allows, that sums are judged by several orders, and that faults still show."""

import pytest
import torch

from lofit_kernels import head_affine_linear, reference
from lofit_kernels.error_bound import (
    ORDERS,
    Stage,
    allowed_error,
    bound_of,
    largest_error,
    orders,
    projection_margins,
    sum_margin,
)
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


def sequential(terms):
    """Sums over dimension 0, one term after another, in the terms' dtype."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["centred", "all of one sign"])
@pytest.mark.parametrize("n", [3, 1000])
def test_the_margin_holds_for_the_worst_order_and_is_no_wide_one(n, mean):
    worst = []
    for seed in range(20):
        torch.manual_seed(seed)
        terms = torch.randn(n, 64) + mean
        exact = terms.double().sum(0)
        margin = sum_margin(Stage(n, terms.double().square().sum(0) + exact.square()))
        worst.append(largest_error(sequential(terms), exact) / margin)
    assert 0.005 < max(worst) < 0.6


def test_a_margin_adds_to_the_rule():
    exact = torch.tensor([1.0], dtype=torch.float64)
    assert allowed_error(exact, exact.float(), margin=0.5) == allowed_error(exact, exact.float()) + 0.5
    assert sum_margin(Stage(5, torch.empty(0, dtype=torch.float64))) == 0


def test_16_bits_get_no_margin_where_they_round_last():
    draw = [torch.randn(*size) for size in ((6, 8), (5, 8), (6, 5), (8,), (8,))]
    wide = projection_margins(*draw)
    narrow = projection_margins(*(x.bfloat16() for x in draw[:3]), *draw[3:])
    assert all(0 < margin < 1e-4 for margin in wide.values())
    assert narrow["y"] == narrow["dz"] == 0 and narrow["da"] > 0 and narrow["dv"] > 0
    assert projection_margins(*draw[:3], None, None)["y"] < wide["y"]
