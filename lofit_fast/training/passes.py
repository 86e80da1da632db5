"""Products in blocks of rows, where oneDNN is slow, and biases added by others: a rewrite of a compiled layer's graph.

On two cores oneDNN ran some 16-bit products of middling size at half the rate of smaller and of larger ones, as if on
one core; the same rows in two blocks took little more than half the time. Which shapes those are is measured on the
present machine, when one is first met, so two processes may choose otherwise, and differ by rounding.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

# rows and columns of a product around those for which it was seen
_ROWS, _COLUMNS = (513, 1535), (256, 1280)
_BLOCKS = (1, 2, 3)
# row counts share a measurement with those next to them
_ROWS_TOGETHER = 128
# what blocks must gain in the measurement, as a share of the whole product's time
_GAIN = 0.15
# weights take turns, as a model's layers do: more than the cache next to a core holds
_WEIGHTS_BYTES, _REPEATS = 2**24, 2

_library = torch.library.Library("lofit_engine", "DEF")
_library.define("mm(Tensor x, Tensor weight) -> Tensor")


class BlockedProducts(CustomGraphPass):
    """For torch._inductor.config.post_grad_custom_post_pass."""

    def uuid(self) -> object:
        """What makes a compiled graph another one in Inductor's cache."""
        return "lofit_engine::mm", 2

    def __call__(self, graph: fx.Graph) -> None:
        """Send every product that may need blocks through `lofit_engine::mm`.

        Of a product with a bias the sum becomes a node of its own, which is fused into what follows: `addmm` would go
        through the whole output twice.
        """
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
            bias, *factors = node.args
            if not node.kwargs and _may_need_blocks(*factors):
                with graph.inserting_before(node):
                    product = graph.call_function(torch.ops.lofit_engine.mm.default, tuple(factors))
                    total = graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
                product.meta, total.meta = dict(node.meta), dict(node.meta)
                node.replace_all_uses_with(total)
                graph.erase_node(node)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            if _may_need_blocks(*node.args):
                node.target = torch.ops.lofit_engine.mm.default


def _may_need_blocks(left: fx.Node, right: fx.Node) -> bool:
    x, columns = left.meta["val"], right.meta["val"].shape[1]
    here = x.device.type == "cpu" and x.dtype.itemsize == 2 and torch.get_num_threads() > 1
    return here and isinstance(columns, int) and _COLUMNS[0] <= columns <= _COLUMNS[1]


@torch.library.impl(_library, "mm", "CPU")
def mm(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight: (rows, depth) by (depth, columns) of one 16-bit dtype."""
    rows, depth = x.shape
    if not _ROWS[0] <= rows <= _ROWS[1]:
        return torch.mm(x, weight)
    together = -(-rows // _ROWS_TOGETHER) * _ROWS_TOGETHER
    blocks = _fastest(together, depth, weight.shape[1], x.dtype, weight.stride(0) == 1, torch.get_num_threads())
    return torch.mm(x, weight) if blocks == 1 else _in_blocks(x, weight, blocks)


@torch.library.register_fake("lofit_engine::mm", lib=_library)
def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _in_blocks(x: Tensor, weight: Tensor, blocks: int) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for part, into in zip(x.chunk(blocks), out.chunk(blocks), strict=True):
        torch.mm(part, weight, out=into)
    return out


@cache
def _fastest(rows: int, depth: int, columns: int, dtype: torch.dtype, transposed: bool, threads: int) -> int:
    """The number of blocks that took least time; 1 unless others gain _GAIN over it."""
    count = max(2, _WEIGHTS_BYTES // (depth * columns * dtype.itemsize))
    shape = (columns, depth) if transposed else (depth, columns)
    weights = [torch.ones(shape, dtype=dtype) for _ in range(count)]
    weights = [weight.t() if transposed else weight for weight in weights]
    x = torch.ones(rows, depth, dtype=dtype)
    seconds: dict[int, list[float]] = {blocks: [] for blocks in _BLOCKS}
    for _ in range(_REPEATS):
        for blocks, kept in seconds.items():
            started = time.perf_counter()
            for weight in weights:
                _in_blocks(x, weight, blocks)
            kept.append(time.perf_counter() - started)
    took = {blocks: min(kept) for blocks, kept in seconds.items()}
    best = min(took, key=took.get)
    return best if took[best] < (1 - _GAIN) * took[1] else 1
