"""Products in blocks of rows, where oneDNN is slow, and biases added by others: a rewrite of a compiled layer's graph.

On two cores oneDNN runs a 16-bit product at half its rate, as if on one core, for some numbers of rows and not for
their neighbours: of (rows, 1536) by (1536, 576) those of 256 to 336, and most from 496 on. The same rows in blocks that
it likes, 416 and 240 for 656, take little more than half the time. What it likes is measured on the present machine,
when a product is first met, so two processes may choose otherwise, and differ by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

# rows and columns of a product around those for which it was seen
_ROWS, _COLUMNS = (257, 1535), (256, 2048)
# rows of blocks are multiples of this, up to the largest; row counts in between share their measurements
_GRAIN, _LARGEST_BLOCK = 32, 480
# grains of the blocks that are tried first: a product as fast as any of these needs none, and no more is measured. A
# size that was measured once stays in oneDNN's cache, with a megabyte
_PROBES = (5, 7, 10, 13, 15)
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
        return "lofit_engine::mm", 3

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
    product = _Product(depth, weight.shape[1], x.dtype, weight.stride(0) == 1, torch.get_num_threads())
    blocks = _fastest(-(-rows // _GRAIN), product)
    return torch.mm(x, weight) if len(blocks) == 1 else _in_blocks(x, weight, [_GRAIN * block for block in blocks])


@torch.library.register_fake("lofit_engine::mm", lib=_library)
def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _in_blocks(x: Tensor, weight: Tensor, blocks: Sequence[int]) -> Tensor:
    """blocks: rows of each; the last may be short of them."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for rows in blocks:
        torch.mm(x[start : start + rows], weight, out=out[start : start + rows])
        start += rows
    return out


class _Product(NamedTuple):
    """A product but for its rows. transposed: whether the weight is stored as (columns, depth)."""

    depth: int
    columns: int
    dtype: torch.dtype
    transposed: bool
    threads: int


@cache
def _fastest(grains: int, product: _Product) -> tuple[int, ...]:
    """The blocks, in grains, that together take least time; a single one unless others gain _GAIN over it."""
    whole = _seconds(grains, product)
    rates = [_seconds(probe, product) / probe for probe in _PROBES if probe < grains]
    if all(rate >= (1 - _GAIN) * whole / grains for rate in rates):
        return (grains,)
    # of every number of grains up to this one: (seconds, its blocks), the last block as large as can be
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for total in range(1, grains + 1):
        splits = ((block, best[total - block]) for block in range(1, min(total, _LARGEST_BLOCK // _GRAIN) + 1))
        best.append(min((_seconds(block, product) + spent, (*rest, block)) for block, (spent, rest) in splits))
    seconds, blocks = best[grains]
    return blocks if seconds < (1 - _GAIN) * whole else (grains,)


@cache
def _seconds(grains: int, product: _Product) -> float:
    """What a product of that many grains of rows takes, the better of _REPEATS means over weights."""
    count = max(2, _WEIGHTS_BYTES // (product.depth * product.columns * product.dtype.itemsize))
    shape = (product.columns, product.depth) if product.transposed else (product.depth, product.columns)
    weights = [torch.ones(shape, dtype=product.dtype) for _ in range(count)]
    weights = [weight.t() if product.transposed else weight for weight in weights]
    x = torch.ones(_GRAIN * grains, product.depth, dtype=product.dtype)
    means = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for weight in weights:
            torch.mm(x, weight)
        means.append((time.perf_counter() - started) / count)
    return min(means)
