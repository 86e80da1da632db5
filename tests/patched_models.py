"""What tests of patched models compare: logits, losses, and everything a model is."""

import torch
from torch import Tensor, nn

from lofit_fast import LofitConfig
from tests.tiny_models import tokens

SOME = [(0, 1), (1, 0), (1, 3), (2, 2)]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONFIGS = {
    "scale_all": LofitConfig(scale="all"),
    "offset_some": LofitConfig(offset=SOME),
    "both": LofitConfig(scale=[(0, 0), (1, 1), (1, 2)], offset=SOME),
}


def logits(model) -> Tensor:
    return model(tokens()).logits


def loss(model) -> Tensor:
    ids = tokens(seed=5)
    return nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def snapshot(model: nn.Module) -> dict[str, tuple]:
    """Everything a refused or undone patch must leave as it was, by name."""
    seen: dict[str, tuple] = {"state": tuple(model.state_dict())}
    for name, module in model.named_modules():
        hooks = [list(getattr(module, kind).items()) for kind in HOOKS]
        seen[f"module {name}"] = (id(module), module.training, vars(module).get("forward"), hooks)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        content = hash(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        seen[f"tensor {name}"] = (id(tensor), tensor.dtype, tensor.requires_grad, content)
    if hasattr(model, "config"):
        seen["config"] = tuple(sorted((key, repr(value)) for key, value in model.config.to_dict().items()))
    return seen
