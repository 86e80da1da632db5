"""Where a test of the Triton kernels has its tensors."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """A GPU when there is one, else the CPU: the kernels then run in Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("no GPU: set TRITON_INTERPRET=1 before Triton is imported")
    return torch.device("cpu")
