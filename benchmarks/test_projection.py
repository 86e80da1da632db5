"""One output projection, forward and backward, by every provider of `benchmarks.operators`. Run by `make bench`.

On a CPU these are CPU clock times of one machine; compare within a group, not between machines. The rows that cannot
run here are skipped with their reason. `python -m benchmarks.gpu` is the one to use on a GPU.
"""

import pytest
import torch

from benchmarks.operators import PROVIDERS, projection, step
from benchmarks.shapes import Shape

T, SHAPE = 1024, Shape(H=16, H_kv=16, D=128, N=2048, inner=0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("setting", ["step 1", "step 2"])
@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
def test_projection(benchmark, provider, setting, dtype):
    p = projection(setting, SHAPE, T, dtype, DEVICE)
    why = provider.missing(p)
    if why:
        pytest.skip(f"{provider.name}, {setting}: {why}")
    benchmark.group = f"{DEVICE} {dtype} {setting} T={T} K={SHAPE.K} N={SHAPE.N}"
    # compiled here rather than inside the first round
    grads = step(provider, p)

    def synchronized():
        found = step(provider, p)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found

    benchmark(synchronized)
    assert all(g.isfinite().all() for g in grads)
