"""Whether nn.Linear computes by torch's own arithmetic: emulated formats and others replace it for a whole process."""

from torch import nn
from torch._C import _nn

FORWARD = nn.Linear.forward
# the function behind the name, which may have been given to another before this was read
LINEAR = _nn.linear


def is_torchs_own() -> bool:
    """Whether nn.Linear's forward and torch.nn.functional.linear are what they were."""
    return nn.Linear.forward is FORWARD and nn.functional.linear is LINEAR
