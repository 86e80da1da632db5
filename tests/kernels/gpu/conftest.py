"""Fixtures of the Triton tests: rows of a matrix, NaN-filled allocations, and the accuracy rule."""

import pytest
import torch

from tests.accuracy_rule import check


@pytest.fixture
def poisoned(monkeypatch):
    """Floating-point memory that torch.empty hands out is NaN, so that an element nobody wrote cannot pass."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.fixture
def accurate():
    """The accuracy rule of the project: accurate(got, expected in float64, eager, ...)."""
    return check


@pytest.fixture
def rows(device):
    """rows(T, K, dtype, kind): random (T, K), plain or with a row stride, an offset, or strided columns."""

    def build(T: int, K: int, dtype: torch.dtype, kind: str = "plain", seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(T, K, generator=generator, dtype=torch.float64).to(dtype).to(device)
        if kind == "plain":
            return values
        if kind == "padded":
            return torch.cat([values, torch.full_like(values[:, :1], float("nan"))], 1)[:, :K]
        if kind == "transposed":
            return values.t().contiguous().t()
        if kind == "expanded":
            return values[:1].expand(T, K)
        raise ValueError(kind)

    return build
