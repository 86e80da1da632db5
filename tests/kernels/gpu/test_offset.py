"""Folding W v into a bias, the column sum and the offset's gradient, against closed forms in float64."""

import pytest
import torch

pytest.importorskip("triton")

from lofit_kernels.error_bound import orders
from lofit_kernels.gpu import launch, offset
from lofit_kernels.gpu.offset import column_sum, offset_bwd, offset_fold
from lofit_kernels.gpu.tiles import ONE_STAGE_ROWS
from tests.ordinary_sample import crossed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = {"none": [], "one": [2], "some": [0, 3], "most": [0, 1, 3], "all": [0, 1, 2, 3]}
H = 4


def parameters(names, D, device, seed=1):
    heads = torch.tensor(HEADS[names], dtype=torch.int64, device=device)
    values = torch.randn(len(heads), D, generator=torch.Generator().manual_seed(seed)).to(device)
    return values, heads


def selected(weight, heads, D):
    return (
        weight.view(weight.shape[0], H, D)[:, heads].flatten(1)
        if weight.is_contiguous()
        else weight[:, (heads[:, None] * D + torch.arange(D, device=heads.device)).reshape(-1)]
    )


def fold_in(dtype, weight, offset, heads, bias):
    folded = selected(weight, heads, offset.shape[1]).to(dtype) @ offset.to(dtype).reshape(-1)
    return folded if bias is None else folded + bias.to(dtype)


def bitwise_equal(x, y):
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


FOLDED = [
    (50, 64, "some", "plain"),
    (33, 80, "most", "padded"),
    (39, 96, "one", "plain"),
    (24, 128, "all", "plain"),
    (5, 256, "all", "transposed"),
    (19, 20, "none", "plain"),
]


# in the ordinary run each shape in one dtype, here and below; slow: each in every one
@pytest.mark.parametrize("N, D, names, kind, with_bias, dtype", crossed(FOLDED, [False, True], DTYPES))
def test_offset_fold_matches_float64(device, poisoned, accurate, rows, dtype, with_bias, N, D, names, kind):
    weight = rows(N, H * D, dtype, kind)
    bias = rows(1, N, dtype, seed=5)[0] if with_bias else None
    v, heads = parameters(names, D, device)
    before = weight.clone()
    folded = offset_fold(weight, v, heads, bias)
    assert folded.dtype == torch.float32
    # float32 whatever the weight's dtype, so it is held to float32 arithmetic
    accurate(folded, fold_in(torch.float64, weight, v, heads, bias), fold_in(torch.float32, weight, v, heads, bias))
    assert torch.equal(weight, before)
    assert bitwise_equal(folded, offset_fold(weight, v, heads, bias))


def test_offset_fold_reads_only_the_selected_columns(device, rows):
    D = 16
    weight = rows(12, H * D, torch.float32)
    v, heads = parameters("one", D, device)
    expected = fold_in(torch.float64, weight, v, heads, None)
    weight[:, : 2 * D], weight[:, 3 * D :] = float("nan"), float("nan")
    torch.testing.assert_close(offset_fold(weight, v, heads).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "T, N, kind, dtype",
    crossed([(300, 40, "plain"), (33, 130, "padded"), (1, 7, "plain"), (70, 129, "transposed")], DTYPES),
)
def test_column_sum_matches_float64(device, poisoned, accurate, rows, monkeypatch, dtype, T, N, kind):
    grad = rows(T, N, dtype, kind)
    before = grad.clone()
    eager = [grad[t].float().sum(0) for (t,) in orders(T, device=device)]
    # in two stages, by few programs and by many, and in one
    for programs, alone in ((1, 0), (launch.PROGRAMS, 0), (launch.PROGRAMS - 1, T)):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        monkeypatch.setattr(offset, "ONE_STAGE_ROWS", alone)
        total = column_sum(grad)
        assert total.dtype == torch.float32
        accurate(total, grad.double().sum(0), *eager)
        assert bitwise_equal(total, column_sum(grad))
    assert torch.equal(grad, before)


@pytest.mark.parametrize(
    "N, D, names, kind, dtype",
    crossed(
        [(50, 64, "some", "plain"), (33, 80, "most", "padded"), (24, 128, "all", "plain"), (19, 20, "none", "plain")],
        DTYPES,
    ),
)
def test_offset_bwd_matches_float64(device, poisoned, accurate, rows, monkeypatch, dtype, N, D, names, kind):
    weight = rows(N, H * D, dtype, kind)
    heads = parameters(names, D, device)[1]
    total = rows(1, N, torch.float32, seed=6)[0]
    before = weight.clone(), total.clone()
    expected = (total.double() @ selected(weight, heads, D).double()).view(-1, D)
    columns = selected(weight, heads, D).float()
    eager = [(total[n] @ columns[n]).view(-1, D) for (n,) in orders(N, device=device)]
    for programs in (1, launch.PROGRAMS):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        dv = offset_bwd(total, weight, heads, D)
        assert dv.dtype == torch.float32
        accurate(dv, expected, *eager)
        assert bitwise_equal(dv, offset_bwd(total, weight, heads, D))
    assert torch.equal(weight, before[0]) and torch.equal(total, before[1])


def test_offset_float64_stays_float64(device, rows):
    D = 16
    weight, grad = rows(9, H * D, torch.float64), rows(21, 9, torch.float64, seed=4)
    v, heads = parameters("some", D, device)
    torch.testing.assert_close(
        offset_fold(weight, v.double(), heads), fold_in(torch.float64, weight, v, heads, None), rtol=1e-13, atol=1e-13
    )
    total = column_sum(grad)
    torch.testing.assert_close(total, grad.sum(0), rtol=1e-13, atol=1e-13)
    expected = (total @ selected(weight, heads, D)).view(-1, D)
    torch.testing.assert_close(offset_bwd(total, weight, heads, D), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offset_without_rows(device, poisoned, rows, dtype):
    assert torch.equal(column_sum(rows(0, 10, dtype)), torch.zeros(10, device=device))
    v, heads = parameters("some", 16, device)
    assert offset_fold(rows(0, H * 16, dtype), v, heads).shape == (0,)
    dv = offset_bwd(torch.zeros(0, device=device), rows(0, H * 16, dtype), heads, 16)
    assert torch.equal(dv, torch.zeros(2, 16, device=device))


def test_offset_errors_name_what_was_got(device, rows):
    v, heads = parameters("some", 16, device)
    with pytest.raises(ValueError, match="torch.int64"):
        column_sum(rows(3, 3, torch.float32).long())
    with pytest.raises(ValueError, match="weight must be float16"):
        offset_fold(rows(3, H * 16, torch.float32).int(), v, heads)
    with pytest.raises(ValueError, match="2 dimensions"):
        column_sum(rows(3, 3, torch.float32)[0])


def test_offset_launch_counts(device, rows):
    v, heads = parameters("some", 16, device)
    weight = rows(20, H * 16, torch.float32)
    with launch.recording("sm_90") as recorded:
        offset_fold(weight, v, heads)
        offset_bwd(column_sum(rows(40, 20, torch.float32)), weight, heads, 16)
    # as few rows as these are summed in one launch each
    assert len(recorded.launches) == 3


@pytest.mark.parametrize("T, launches", [(1, 1), (ONE_STAGE_ROWS, 1), (ONE_STAGE_ROWS + 1, 2), (65_536, 2)])
def test_column_sum_of_few_rows_is_one_launch(device, T, launches):
    with launch.recording("sm_90") as recorded:
        column_sum(torch.ones((), device=device).expand(T, 512))
    assert len(recorded.launches) == launches


def test_column_sum_of_an_expanded_gradient(device, rows):
    # what y.sum().backward() sends: every stride is 0
    grad = torch.ones((), device=device).expand(70, 129)
    assert torch.equal(column_sum(grad), torch.full((129,), 70.0, device=device))
    grad = rows(70, 129, torch.float32, "expanded")
    torch.testing.assert_close(column_sum(grad), 70 * grad[0])


@pytest.mark.parametrize(
    "value", [1.0 + 2**-8, 1.0 + 3 * 2**-8, -(1.0 + 2**-8), 3.4e38, float("inf"), float("-inf"), float("nan"), 1e-40]
)
def test_round_to_bfloat16_is_to_nearest_even(device, value):
    from lofit_kernels.gpu.affine import affine_fwd

    # half-way cases: 1 * z + v is exact in float32 and has to be rounded like PyTorch does
    z = torch.zeros(1, 16, dtype=torch.bfloat16, device=device)
    v = torch.full((1, 16), value, device=device)
    heads = torch.zeros(1, dtype=torch.int64, device=device)
    x, expected = affine_fwd(z, None, None, v, heads, 16), v.to(torch.bfloat16)
    assert torch.equal(x, expected) or (x.isnan().all() and expected.isnan().all())
