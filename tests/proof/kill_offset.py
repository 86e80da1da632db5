"""Cases of the offset family: folding W v, the column sum, and the offset's gradient."""

from __future__ import annotations

import torch

from lofit_kernels.error_bound import orders
from lofit_kernels.gpu.offset import column_sum, offset_bwd, offset_fold
from tests.accuracy_rule import check
from tests.proof.kernel_inputs import Case, case, columns, far_rows, heads, programs, rows, unlisted, values, vector
from tests.proof.watch import Watch

CASES: list[Case] = []
H = 7


def _read_once(watch: Watch, name: str, used: torch.Tensor, times: int = 1) -> None:
    """In the first launch these columns of tensor `name` were read `times` times, the others never."""
    region = watch.launches[0].regions[name]
    reads = torch.from_numpy(region.reads).view(region.shape)
    expected = torch.zeros(region.shape[1], dtype=reads.dtype)
    expected[used] = times
    assert torch.equal(reads, expected.expand_as(reads)), f"{name} was read more or less often than needed"


@case(CASES, "fold, float64", 9, 20, heads(5, 1), torch.float64)
@case(CASES, "fold, no padding, 16 bytes aligned", 16, 16, heads(2, 0), torch.float16)
@case(CASES, "fold with a bias", 13, 20, heads(6, 0, 3, 4, 2, 1), torch.bfloat16, bias=True, extra=3)
@case(CASES, "fold", 11, 24, heads(6, 0, 3, 4, 2), torch.float32, bias=True, extra=8)
@case(CASES, "fold without a bias", 11, 12, heads(3, 1), torch.float32)
def _fold(
    watch: Watch, N: int, D: int, listed: torch.Tensor, dtype: torch.dtype, bias: bool = False, extra: int = 1
) -> None:
    weight = rows(N, H * D, dtype, extra)
    v, b = values(len(listed), D), vector(N, dtype, seed=5) if bias else None
    watch.forbid(weight, columns(unlisted(H, listed), D))
    taken = weight[:, columns(listed, D)]
    folded = offset_fold(weight, v, listed, b)

    def by(wide: torch.dtype) -> torch.Tensor:
        product = taken.to(wide) @ v.to(wide).reshape(-1)
        return product if b is None else product + b.to(wide)

    assert folded.dtype == torch.promote_types(dtype, torch.float32)
    check(folded, by(torch.float64), by(folded.dtype))
    _read_once(watch, "weight", columns(listed, D))


@case(CASES, "column sum, float64", 40, 9, torch.float64)
@case(CASES, "column sum, many partial sums", 2101, 7, torch.float32, extra=2)
@case(CASES, "column sum, several blocks a program", 2065, 200, torch.float16, number=40, extra=8)
@case(CASES, "column sum in one launch, several blocks", 600, 70, torch.float16, extra=8)
@case(CASES, "column sum", 37, 131, torch.bfloat16, extra=5)
def _column_sum(watch: Watch, T: int, N: int, dtype: torch.dtype, number: int = 2048, extra: int = 0) -> None:
    grad = rows(T, N, dtype, extra)
    with programs(number):
        total = column_sum(grad)
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    check(total, grad.double().sum(0), *(grad[t].to(total.dtype).sum(0) for (t,) in orders(T)))
    _read_once(watch, "grad", torch.arange(N))


def _eager_dv(total: torch.Tensor, taken: torch.Tensor, D: int) -> list[torch.Tensor]:
    """dv in several orders of the sum over N. total: (N,); taken: (N, h D), the selected columns of W."""
    return [(total[n] @ taken[n].to(total.dtype)).view(-1, D) for (n,) in orders(len(total))]


@case(CASES, "offset backward, float64", 9, 20, heads(5, 1), torch.float64)
@case(CASES, "offset backward, several blocks a program", 170, 24, heads(6, 0, 3), torch.float16, number=5, extra=8)
@case(CASES, "offset backward", 37, 20, heads(6, 0, 3), torch.bfloat16, extra=5)
def _offset_bwd(
    watch: Watch, N: int, D: int, listed: torch.Tensor, dtype: torch.dtype, number: int = 2048, extra: int = 1
) -> None:
    weight, total = rows(N, H * D, dtype, extra), vector(N, seed=6)
    watch.forbid(weight, columns(unlisted(H, listed), D))
    taken = weight[:, columns(listed, D)]
    with programs(number):
        dv = offset_bwd(total, weight, listed, D)
    assert dv.dtype == torch.promote_types(dtype, torch.float32)
    check(dv, (total.double() @ taken.double()).view(-1, D), *_eager_dv(total.to(dv.dtype), taken, D))
    _read_once(watch, "weight", columns(listed, D))


@case(CASES, "rows 2^30 elements apart", 2**30)
@case(CASES, "rows 2^31 elements apart", 2**31)
def _far(watch: Watch, stride: int) -> None:
    D, listed = 16, heads(3, 1)
    far = far_rows(3, H * D, torch.float16, stride)
    check(column_sum(far), far.double().sum(0), far.float().sum(0))
    v, total, taken = values(2, D), vector(3), far[:, columns(listed, D)]
    check(offset_fold(far, v, listed), taken.double() @ v.double().view(-1), taken.float() @ v.view(-1))
    dv = offset_bwd(total, far, listed, D)
    check(dv, (total.double() @ taken.double()).view(-1, D), *_eager_dv(total, taken, D))
