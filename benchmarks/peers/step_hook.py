"""LoFiT the natural way, and the same with its arithmetic compiled."""

import torch
from torch import Tensor, nn

from benchmarks.peers.hook import HookLofit, Vectors
from benchmarks.peers.provider import Attached


def attach(model: nn.Module, vectors: Vectors) -> Attached:
    """Forward pre-hooks with float32 parameters."""
    return attached_hook(model, HookLofit(model, vectors))


def attach_compiled(model: nn.Module, vectors: Vectors) -> Attached:
    """The same hooks, one fused loop each way instead of a dozen."""
    return attached_hook(model, _CompiledHook(model, vectors))


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


class _CompiledHook(HookLofit):
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
                z = apply(z, dense)
            return (z,)

        return edit


@torch.compile(dynamic=True)
def _scaled(z: Tensor, a: Tensor) -> Tensor:
    return (z.unflatten(-1, a.shape) * (1 + a)).flatten(-2).to(z.dtype)


@torch.compile(dynamic=True)
def _shifted(z: Tensor, v: Tensor) -> Tensor:
    return (z.unflatten(-1, v.shape) + v).flatten(-2).to(z.dtype)
