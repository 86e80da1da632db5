"""The accuracy rule of the project, for tests."""

import torch


def check(got: torch.Tensor, expected: torch.Tensor, eager: torch.Tensor) -> None:
    """Error against float64 <= max(2 x eager's error, 1 ulp of the output dtype at the largest expected value)."""
    assert expected.dtype == torch.float64
    assert got.shape == expected.shape
    if got.numel() == 0:
        return
    if got.dtype == torch.float64:
        # nothing here is more exact: held to a few of its own units over a sum
        error = (got - expected).abs().max().item()
        assert error <= 1e-13 * (1 + expected.abs().max().item()), f"error {error:.3e}"
        return
    error = (got.double() - expected).abs().max().item()
    allowed = (eager.double() - expected).abs().max().item()
    # eps spans a whole binade upwards: one ulp at m is eps times the power of two below m
    largest = expected.abs().max()
    ulp = torch.finfo(got.dtype).eps * 2 ** torch.floor(torch.log2(largest)).item() if largest > 0 else 0.0
    assert error <= max(2 * allowed, ulp), f"error {error:.3e}; eager {allowed:.3e}, ulp {ulp:.3e}"


def check_with_dtype(got: torch.Tensor, expected: torch.Tensor, eager: torch.Tensor) -> None:
    """`check`, and that the output has the dtype of eager's."""
    assert got.dtype == eager.dtype
    check(got, expected, eager)
