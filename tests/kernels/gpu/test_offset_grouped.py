"""Many layers' offsets in one launch, against float64 and against the layers one by one."""

import pytest
import torch

pytest.importorskip("triton")

from lofit_kernels.error_bound import orders
from lofit_kernels.gpu import launch
from lofit_kernels.gpu.address_tables import TABLES
from lofit_kernels.gpu.offset_grouped import grouped_bwd, grouped_fold, layer_table
from tests.ordinary_sample import crossed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of each layer: its number of heads, those selected, how its weight lies in memory
LAYERS = [
    (4, [0, 3], "plain"),
    (2, [1], "padded"),
    (4, [], "plain"),
    (4, [0, 1, 3], "transposed"),
    (3, [0, 1, 2], "plain"),
]


def layers(rows, N, D, dtype, kinds=LAYERS, seed=0):
    """Weights (N, K), offsets (h, D) and heads of a few layers that differ in K and in their heads."""
    weights = [rows(N, H * D, dtype, kind, seed=seed + i) for i, (H, _, kind) in enumerate(kinds)]
    device, wide = weights[0].device, torch.promote_types(dtype, torch.float32)
    heads = [torch.tensor(listed, dtype=torch.int64, device=device) for _, listed, _ in kinds]
    offsets = [rows(len(listed), D, wide, seed=seed + 9 + i) for i, listed in enumerate(heads)]
    return weights, offsets, heads


def selected(weight, heads, D):
    return weight[:, (heads[:, None] * D + torch.arange(D, device=heads.device)).reshape(-1)]


def bitwise_equal(x, y):
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("N, D, dtype", crossed([(33, 80), (13, 20)], DTYPES))
def test_grouped_fold_matches_float64(device, poisoned, accurate, rows, dtype, N, D):
    weights, offsets, heads = layers(rows, N, D, dtype)
    before = [x.clone() for x in (*weights, *offsets)]
    found = grouped_fold(weights, offsets, heads)
    for folded, weight, offset, listed in zip(found, weights, offsets, heads, strict=True):
        assert folded.dtype == torch.float32
        columns = selected(weight, listed, D)
        exact = columns.double() @ offset.double().reshape(-1)
        accurate(folded, exact, columns.float() @ offset.reshape(-1))
        # what a layer gets does not depend on its company
        assert bitwise_equal(folded, grouped_fold([weight], [offset], [listed])[0])
    assert all(bitwise_equal(x, y) for x, y in zip(before, (*weights, *offsets), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# sums long enough for their own rounding to count: eager fuses products into them, the interpreter does not
@pytest.mark.parametrize("N, D", [pytest.param(70, 80, marks=pytest.mark.slow), (13, 20)])
def test_grouped_bwd_matches_float64(device, poisoned, accurate, rows, monkeypatch, dtype, N, D):
    weights, _, heads = layers(rows, N, D, dtype)
    sums = [rows(1, N, torch.float32, seed=20 + i)[0] for i in range(len(weights))]
    before = [x.clone() for x in (*weights, *sums)]
    for programs in (1, launch.PROGRAMS):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        found = grouped_bwd(sums, weights, heads, D)
        exact, eager = [], []
        for dv, total, weight, listed in zip(found, sums, weights, heads, strict=True):
            assert (dv.dtype, dv.shape) == (torch.float32, (len(listed), D))
            columns = selected(weight, listed, D)
            exact.append((total.double() @ columns.double()).view(-1, D))
            eager.append([(total[n] @ columns[n].float()).view(-1, D) for (n,) in orders(N, device=device)])
        accurate(torch.cat(found), torch.cat(exact), *(torch.cat(order) for order in zip(*eager, strict=True)))
        again = grouped_bwd(sums, weights, heads, D)
        assert all(bitwise_equal(x, y) for x, y in zip(found, again, strict=True))
    assert all(bitwise_equal(x, y) for x, y in zip(before, (*weights, *sums), strict=True))


def test_grouped_reads_only_the_selected_columns(device, rows):
    D, N = 16, 12
    weights, offsets, heads = layers(rows, N, D, torch.float32, [(4, [2], "plain"), (4, [0, 2], "plain")])
    sums = [rows(1, N, torch.float32, seed=i)[0] for i in (3, 4)]
    expected = grouped_fold(weights, offsets, heads), grouped_bwd(sums, weights, heads, D)
    for weight, listed in zip(weights, heads, strict=True):
        for head in {0, 1, 2, 3} - set(listed.tolist()):
            weight[:, head * D : (head + 1) * D] = float("nan")
    found = grouped_fold(weights, offsets, heads), grouped_bwd(sums, weights, heads, D)
    assert all(torch.equal(x, y) for f, e in zip(found, expected, strict=True) for x, y in zip(f, e, strict=True))


def test_grouped_addresses_that_are_not_aligned(device, rows):
    D, N = 16, 11
    weights, offsets, heads = layers(rows, N, D, torch.float32, [(2, [1], "plain"), (2, [0, 1], "plain")])
    shifted = torch.empty(N * 2 * D + 1, device=device)[1:].view(N, 2 * D).copy_(weights[0])
    assert shifted.data_ptr() % 16
    for x, y in zip(
        grouped_fold([shifted, weights[1]], offsets, heads), grouped_fold(weights, offsets, heads), strict=True
    ):
        assert torch.equal(x, y)


def test_grouped_float64_stays_float64(device, rows):
    D, N = 16, 9
    weights, offsets, heads = layers(rows, N, D, torch.float64)
    sums = [rows(1, N, torch.float64, seed=i)[0] for i in range(len(weights))]
    for i, (folded, dv) in enumerate(
        zip(grouped_fold(weights, offsets, heads), grouped_bwd(sums, weights, heads, D), strict=True)
    ):
        columns = selected(weights[i], heads[i], D)
        torch.testing.assert_close(folded, columns @ offsets[i].reshape(-1), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(dv, (sums[i] @ columns).view(-1, D), rtol=1e-13, atol=1e-13)


def test_grouped_follows_tensors_that_move(device, rows):
    D = 16
    weights, offsets, heads = layers(rows, 7, D, torch.float32, [(2, [1], "plain")])
    first = grouped_fold(weights, offsets, heads)[0]
    # in place the addresses stay, as an optimizer's step leaves them
    offsets[0].mul_(2)
    torch.testing.assert_close(grouped_fold(weights, offsets, heads)[0], 2 * first)
    assert torch.equal(grouped_fold(weights, [offsets[0] / 2], heads)[0], first)


def test_grouped_without_rows(device, poisoned, rows):
    weights, offsets, heads = layers(rows, 0, 16, torch.float32)
    assert [x.shape for x in grouped_fold(weights, offsets, heads)] == [(0,)] * len(weights)
    sums = [torch.zeros(0, device=device)] * len(weights)
    for dv, listed in zip(grouped_bwd(sums, weights, heads, 16), heads, strict=True):
        assert torch.equal(dv, torch.zeros(len(listed), 16, device=device))
    none = [heads[2]] * 2
    for dv in grouped_bwd([torch.zeros(5, device=device)] * 2, [torch.zeros(5, 64, device=device)] * 2, none, 16):
        assert dv.shape == (0, 16)


def test_grouped_launch_counts(device, rows):
    weights, offsets, heads = layers(rows, 20, 16, torch.float32)
    sums = [torch.zeros(20, device=device)] * len(weights)
    with launch.recording("sm_90") as recorded:
        grouped_fold(weights, offsets, heads)
        assert len(recorded.launches) == 1
        # so few rows are summed in one go
        grouped_bwd(sums, weights, heads, 16)
        assert len(recorded.launches) == 2


def test_grouped_tables_are_made_once(device, rows):
    weights, offsets, heads = layers(rows, 20, 16, torch.float32, LAYERS[:3])
    grouped_fold(weights, offsets, heads)
    made = TABLES.made
    grouped_fold(weights, offsets, heads)
    assert TABLES.made == made


def test_grouped_bwd_reads_the_weights_that_there_are_now(device, rows):
    weights, offsets, heads = layers(rows, 13, 20, torch.float32, LAYERS[:1])
    table = layer_table(weights, offsets, heads)
    sums = [rows(1, 13, torch.float32)[0]]
    moved = weights[0].clone()
    # a weight whose data was replaced after the forward pass: the old numbers may be gone
    weights[0].fill_(float("nan"))
    weights[0].data = moved
    assert bitwise_equal(
        grouped_bwd(sums, weights, heads, 20, table)[0], grouped_bwd(sums, [moved.clone()], heads, 20)[0]
    )
