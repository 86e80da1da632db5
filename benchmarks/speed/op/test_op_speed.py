"""One output projection, forward and backward, by every row of `operators.py`. Run by `make bench`.

On a CPU these are CPU clock times of one machine; compare within a group, not between machines. The rows that cannot
run here are skipped with their reason. `python -m benchmarks.speed.gpu` is the one to use on a GPU.
"""

import pytest
import torch

from benchmarks.speed.op.operators import EVERYONE, projection, step
from lofit_kernels.shapes import SHAPES

T, TIMED_PROJECTIONS = 512, ("Llama-3-8B", "Gemma-7B")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("setting", ["step 1", "step 2"])
@pytest.mark.parametrize("model", TIMED_PROJECTIONS)
@pytest.mark.parametrize("operator", EVERYONE.values(), ids=EVERYONE)
def test_projection(benchmark, operator, model, setting):
    shape = SHAPES[model]
    p = projection(setting, shape, T, torch.bfloat16, DEVICE)
    why = operator.missing(p)
    if why:
        pytest.skip(f"{operator.name}, {setting}: {why}")
    benchmark.group = f"{DEVICE} bfloat16 {setting} T={T} {model} K={shape.K} N={shape.N}"
    # compiled here rather than inside the first round
    grads = step(operator, p)

    def synchronized():
        found = step(operator, p)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found

    benchmark(synchronized)
    assert all(g.isfinite().all() for g in grads)
