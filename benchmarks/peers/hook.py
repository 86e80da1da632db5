"""LoFiT the natural way: a forward pre-hook on every adapted output projection, float32 parameters, plain autograd.

Shares no code with the op or the patcher, so that it can serve as their oracle as well as their peer.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.peers.peer import Attached, Vectors


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


class CompiledHook(HookLofit):
    """The same with its arithmetic compiled: one fused loop each way instead of a dozen."""

    def _edit(self, layer: int):
        def edit(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0]
            for component, apply in (("scale", _scaled), ("offset", _shifted)):
                rows = self.parameters.get((layer, component))
                if rows is None:
                    continue
                # dense outside, so that layers with other numbers of heads share one graph
                size = (z.shape[-1] // rows.shape[1], rows.shape[1])
                dense = rows.new_zeros(size).index_copy(0, self.heads[layer, component], rows)
                z = _compiled(apply)(z, dense)
            return (z,)

        return edit


@cache
def _compiled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(function, dynamic=True)


def _scaled(z: Tensor, a: Tensor) -> Tensor:
    return (z.unflatten(-1, a.shape) * (1 + a)).flatten(-2).to(z.dtype)


def _shifted(z: Tensor, v: Tensor) -> Tensor:
    return (z.unflatten(-1, v.shape) + v).flatten(-2).to(z.dtype)


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """Forward pre-hooks with float32 parameters."""
    return attached_hook(model, HookLofit(model, vectors))


def attach_compiled(model: nn.Module, vectors: Vectors) -> Attached:
    """The same hooks, compiled."""
    return attached_hook(model, CompiledHook(model, vectors))


def attached_hook(model: nn.Module, hook: HookLofit) -> Attached:
    """Hooks that sit in a model already."""

    @torch.no_grad()
    def assign(values: Vectors) -> None:
        for key, (_, rows) in values.items():
            hook.parameters[key].copy_(rows)

    scales = [rows for (_, component), rows in hook.parameters.items() if component == "scale"]

    def penalty() -> Tensor:
        return sum(scale.abs().sum() for scale in scales)

    return Attached(model, list(hook.parameters.values()), assign, penalty if scales else None)


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


def train_hook(
    model: nn.Module,
    hook: HookLofit,
    epochs: Sequence[Sequence[dict]],
    step: HookStep,
    seconds: list[float] | None = None,
) -> list[float]:
    """A plain loop over given batches: full logits, AdamW, linear decay, clipping. Returns the mean loss per epoch.

    epochs: per epoch, batches of input_ids, attention_mask and labels (B, S). seconds: gets those of every step.
    """
    parameters = list(hook.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=step.lr, weight_decay=0.0)
    total = sum(map(len, epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: max(0.0, (total - done) / total))
    model.train()
    seconds = [] if seconds is None else seconds
    return [_epoch(model, hook, batches, step, optimizer, schedule, seconds) for batches in epochs]


def _epoch(model, hook: HookLofit, batches: Iterable[dict], step: HookStep, optimizer, schedule, seconds) -> float:
    losses = []
    for batch in batches:
        started = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        losses.append(loss.item())
        penalty = sum(p.abs().sum() for (_, component), p in hook.parameters.items() if component == "scale")
        (loss + step.l1 * penalty).backward()
        torch.nn.utils.clip_grad_norm_(list(hook.parameters.values()), step.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return sum(losses) / len(losses)
