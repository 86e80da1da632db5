"""The accuracy rule of the project, for tests."""

import torch

from lofit_kernels.error_bound import allowed_error, largest_error


def check(got: torch.Tensor, expected: torch.Tensor, *eager: torch.Tensor) -> None:
    """Error against float64 within `allowed_error`; eager: one result per order of the same sum, see there."""
    assert expected.dtype == torch.float64
    assert got.shape == expected.shape
    if got.numel() == 0:
        return
    error = largest_error(got, expected)
    if got.dtype == torch.float64:
        # nothing here is more exact: held to a few of its own units over a sum
        assert error <= 1e-13 * (1 + expected.abs().max().item()), f"error {error:.3e}"
        return
    assert all(x.dtype == got.dtype for x in eager), f"{got.dtype}, eager {[x.dtype for x in eager]}"
    allowed = allowed_error(expected, *eager)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def check_with_dtype(got: torch.Tensor, expected: torch.Tensor, *eager: torch.Tensor) -> None:
    """`check`, and that the output has the dtype of eager's, in float64 too."""
    assert all(x.dtype == got.dtype for x in eager)
    check(got, expected, *eager)
