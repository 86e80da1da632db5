"""Cases of the grouped family: folds and gradients of many layers, reached through a table of addresses."""

from __future__ import annotations

import torch

from lofit_kernels.error_bound import orders
from lofit_kernels.gpu.offset_grouped import grouped_bwd, grouped_fold
from tests.accuracy_rule import check
from tests.proof.kernel_inputs import Case, case, columns, far_rows, heads, programs, rows, unlisted, values, vector
from tests.proof.watch import Watch

CASES: list[Case] = []
# of each layer the number of heads and those listed: more than one step of the loop, none, in another order
LAYERS = ((7, heads(6, 0, 3, 4, 2)), (3, heads()), (4, heads(1, 3)))


@case(CASES, "rows 2^30 elements apart", 3, 16, torch.float16, stride=2**30)
@case(CASES, "float64", 9, 20, torch.float64)
@case(CASES, "several blocks a program", 70, 16, torch.float16, extra=8, number=10)
@case(CASES, "float32", 70, 24, torch.float32)
@case(CASES, "bfloat16", 37, 20, torch.bfloat16, extra=5)
def _grouped(
    watch: Watch, N: int, D: int, dtype: torch.dtype, extra: int = 0, number: int = 2048, stride: int = 0
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    weights, offsets = [], []
    for i, (H, listed) in enumerate(LAYERS):
        far = stride + 8 * i if stride else 0
        weight = far_rows(N, H * D, dtype, far, i) if far else rows(N, H * D, dtype, extra * (i + 1), seed=i)
        watch.forbid(weight, columns(unlisted(H, listed), D))
        weights.append(weight)
        offsets.append(values(len(listed), D, seed=10 + i).to(wide))
    lists, sums = [listed for _, listed in LAYERS], [vector(N, wide, seed=20 + i) for i in range(len(LAYERS))]
    watch.reach(*weights, *offsets, *lists)
    folded = grouped_fold(weights, offsets, lists)
    with programs(number):
        found = grouped_bwd(sums, weights, lists, D)
    exact, eager = [], []
    for i, listed in enumerate(lists):
        taken, v = weights[i][:, columns(listed, D)], offsets[i].reshape(-1)
        assert folded[i].dtype == found[i].dtype == wide
        check(folded[i], taken.double() @ v.double(), taken.to(wide) @ v)
        exact.append((sums[i].double() @ taken.double()).view(-1, D))
        eager.append([(sums[i][n] @ taken[n].to(wide)).view(-1, D) for (n,) in orders(N)])
    check(torch.cat(found), torch.cat(exact), *(torch.cat(order) for order in zip(*eager, strict=True)))
    for launch in watch.launches[:2]:
        for i, listed in enumerate(lists):
            read = torch.from_numpy(launch.regions[f"reached {i}"].reads).view(N, -1)
            assert (read[:, columns(listed, D)] == 1).all() and read.sum() == N * len(listed) * D
