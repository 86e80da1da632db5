"""Which projections the op may stand in for: an exact nn.Linear, dense, that nobody listens to."""

from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from lofit_fast.patching.frozen_linear import products_of
from lofit_fast.patching.placement import is_dense
from lofit_fast.patching.prepacked import is_replaced
from lofit_fast.patching.torch_linear import FORWARD, LINEAR


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is exactly an nn.Linear, dense, that nobody listens to and that computes in full."""
    return plain_tensors(module) is not None and products_of(module) is None


# asked in every forward: straight, since what is generated or fetched by name takes as long as a launch
def plain_tensors(module: nn.Module, moved: bool = False) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of a module that the fused path may stand in for; None of any other.

    That is exactly an nn.Linear, dense, and nobody listening, in 8 bits or prepacked for now or not, with torch's own
    arithmetic.
    moved: where nothing but its forward may have been replaced, which is looked at elsewhere.
    """
    if type(module) is not nn.Linear:
        return None
    # `is_torchs_own`, without its call
    if nn.Linear.forward is not FORWARD or nn.functional.linear is not LINEAR:
        return None
    own = vars(module)
    if "forward" in own and not moved and products_of(module) is None and is_replaced(module):
        return None
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return None
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    all_of = module_globals
    if all_of._global_forward_hooks or all_of._global_forward_pre_hooks:
        return None
    if all_of._global_backward_hooks or all_of._global_backward_pre_hooks:
        return None
    parameters = own["_parameters"]
    # a packed layer may be called nn.Linear and have neither; sharded ones have theirs as plain attributes
    weight = parameters["weight"] if "weight" in parameters else getattr(module, "weight", None)
    bias = parameters["bias"] if "bias" in parameters else getattr(module, "bias", None)
    return (weight, bias) if is_dense(weight) and (bias is None or is_dense(bias)) else None
