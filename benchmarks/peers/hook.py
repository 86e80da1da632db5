"""LoFiT the natural way: a forward pre-hook on every adapted output projection, float32 parameters, plain autograd.

Shares no code with the op or the patcher, so that it can serve as their oracle as well as their rival.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# (layer, component) -> (heads, rows (h, D)); component is "scale" or "offset"
Vectors = dict[tuple[int, str], tuple[list[int], Tensor]]


class HookLofit:
    """z -> (1 + a) z + v before each o_proj, in the parameters' dtype, cast back to z's.

    model: a decoder with model.layers[n].self_attn.o_proj; frozen until `remove`. vectors: initial values, copied.
    parameters: by (layer, component), leaves in `dtype`.
    """

    def __init__(self, model: nn.Module, vectors: Vectors, dtype: torch.dtype = torch.float32) -> None:
        self.heads = {key: torch.tensor(heads, device=rows.device) for key, (heads, rows) in vectors.items()}
        self.parameters = {key: nn.Parameter(rows.detach().clone().to(dtype)) for key, (_, rows) in vectors.items()}
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        layers = sorted({layer for layer, _ in vectors})
        projections = {n: model.model.layers[n].self_attn.o_proj for n in layers}
        self._hooks = [p.register_forward_pre_hook(self._edit(n)) for n, p in projections.items()]

    def _edit(self, layer: int):
        def edit(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0]
            for component in ("scale", "offset"):
                rows = self.parameters.get((layer, component))
                if rows is None:
                    continue
                by_head = z.unflatten(-1, (-1, rows.shape[1]))
                dense = rows.new_zeros(by_head.shape[-2:]).index_copy(0, self.heads[layer, component], rows)
                z = (by_head * (1 + dense) if component == "scale" else by_head + dense).flatten(-2)
            return (z.to(args[0].dtype),)

        return edit

    def remove(self) -> None:
        """Take the hooks out and make trainable again what was."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._trainable:
            parameter.requires_grad_(True)


def vectors_of(handle) -> Vectors:
    """The vectors a lofit_fast handle holds."""
    return {
        (number, component): (layer.heads(component), getattr(layer, component).detach().clone())
        for number, layer in handle.layers.items()
        for component in ("scale", "offset")
        if getattr(layer, component) is not None
    }


@dataclass(frozen=True)
class HookStep:
    """Hyperparameters of one step, as in `lofit_fast.Recipe`."""

    lr: float
    l1: float = 0.0
    max_grad_norm: float = 1.0


def train_hook(model: nn.Module, hook: HookLofit, epochs: Sequence[Sequence[dict]], step: HookStep) -> list[float]:
    """A plain loop over given batches: full logits, AdamW, linear decay, clipping. Returns the mean loss per epoch.

    epochs: per epoch, batches of input_ids, attention_mask and labels (B, S).
    """
    parameters = list(hook.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=step.lr, weight_decay=0.0)
    total = sum(map(len, epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: max(0.0, (total - done) / total))
    model.train()
    return [_epoch(model, hook, batches, step, optimizer, schedule) for batches in epochs]


def _epoch(model, hook: HookLofit, batches: Iterable[dict], step: HookStep, optimizer, schedule) -> float:
    losses = []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        losses.append(loss.item())
        penalty = sum(p.abs().sum() for (_, component), p in hook.parameters.items() if component == "scale")
        (loss + step.l1 * penalty).backward()
        torch.nn.utils.clip_grad_norm_(list(hook.parameters.values()), step.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return sum(losses) / len(losses)
