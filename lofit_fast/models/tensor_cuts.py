"""What transformers' plan for tensor parallelism makes of a model: the shapes on one device, and what is sent."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from torch import nn

from lofit_fast.models.meta_counts import Decoder, Lowest
from lofit_fast.models.whole_heads import check_heads

# styles of a plan -> the dimension of the weight that is cut; None for whole ones
_CUT = {
    "colwise": 0,
    "colwise_rep": 0,
    "colwise_gather_output": 0,
    "rowwise": 1,
    "rowwise_rep": 1,
    "embedding_rowwise": 0,
    "replicate": None,
    "replicated": None,
}
_GATHERED = ("colwise_rep", "colwise_gather_output")


@dataclass(frozen=True)
class Sent:
    """Numbers that the collectives of a step take per token: all-reduces forward and backward, and the last gather."""

    forward: int
    backward: int
    gathered: int


def planned(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """name -> (linear or embedding, its style), as `tp_plan="auto"` treats them.

    Raises ValueError for a model without a plan, or with a style in it that is not counted here.
    """
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise ValueError(f"transformers has no plan for tensor parallelism of a {type(model).__name__}")
    found = {}
    for name, module in model.named_modules():
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if style is None:
            continue
        if style not in _CUT or not isinstance(module, nn.Linear | nn.Embedding):
            raise ValueError(
                f"the plan for a {type(model).__name__} treats {name} as {style!r}: it is not counted here"
            )
        found[name] = module, style
    # a plan may cut parameters that are no module's weight, such as those of experts
    for name, _ in model.named_parameters():
        style = next((style for pattern, style in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if style is not None and _CUT.get(style, 0) is not None and name.removesuffix(".weight") not in found:
            raise ValueError(
                f"the plan for a {type(model).__name__} treats {name} as {style!r}: it is not counted here"
            )
    return found


def sent_per_token(decoder: Decoder, lowest: Lowest, n: int) -> Sent:
    """What one of n processes gives to collectives in a training step, in numbers per token.

    lowest: where vectors begin; below it there is no backward.
    Source: transformers.distributed.tensor_parallel. The partial outputs of a row-wise linear, and of an embedding
    cut by tokens, are summed. So is, in backward, the partial gradient of a column-wise linear's input, for each
    linear by itself. The output head's parts are gathered.
    """
    forward = backward = gathered = 0
    with_backward = _after(decoder, lowest)
    for module, style in planned(decoder.model).values():
        if isinstance(module, nn.Embedding):
            forward += module.embedding_dim
        elif style.startswith("rowwise"):
            forward += module.out_features
        elif style.startswith("colwise"):
            backward += module.in_features * (module in with_backward)
            gathered += math.ceil(module.out_features / n) * n * (style in _GATHERED)
    return Sent(forward, backward, gathered)


def _after(decoder: Decoder, lowest: Lowest) -> set[nn.Module]:
    """The modules that gradients of the vectors go through: above the lowest layer, and in it after its projection."""
    inside = list(decoder.layers[lowest.index].modules())
    below = {module for layer in decoder.layers[: lowest.index] for module in layer.modules()}
    return set(decoder.model.modules()) - below - set(inside[: inside.index(lowest.projection) + 1])


def cut(model: nn.Module, n: int) -> None:
    """Give a meta model the shapes that the largest of n processes has of it.

    Raises what `planned` raises, and ValueError where n does not divide the heads.
    """
    found = planned(model)
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    check_heads(text, model.tp_plan, n, f"{n} devices")
    # an output head that is the embedding stays it
    parts: dict[tuple[int, int], tuple[nn.Parameter, nn.Parameter]] = {}
    for module, style in found.values():
        if (dim := _CUT[style]) is None:
            continue
        shape = list(module.weight.shape)
        shape[dim] = math.ceil(shape[dim] / n)
        part = nn.Parameter(module.weight.new_empty(shape), requires_grad=False)
        # with the whole one, since its id is another's once it is gone
        module.weight, _ = parts.setdefault((id(module.weight), dim), (part, module.weight))
        if isinstance(module, nn.Linear):
            module.in_features, module.out_features = shape[1], shape[0]
            if module.bias is not None and dim == 0:
                module.bias = nn.Parameter(module.bias.new_empty(shape[0]), requires_grad=False)
