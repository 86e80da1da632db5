"""How much two adapters of one base have in common: their heads, and on these their offsets' directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor, nn

from lofit_fast.config import Head
from lofit_fast.heads import jaccard
from lofit_fast.patching.storage import Adapter


def offsets_in(adapter: Adapter) -> dict[Head, Tensor]:
    """v (D,) of every head of an adapter that has an offset. Raises ValueError for an adapter without offsets."""
    listed, found = adapter.config.offset, {}
    for (component, layer), rows in adapter.tensors.items():
        if component == "offset":
            heads = range(len(rows)) if listed == "all" else sorted(head for number, head in listed if number == layer)
            found |= {(layer, head): row.detach() for head, row in zip(heads, rows, strict=True)}
    if not found:
        raise ValueError("expected an adapter with offsets, got one of scales alone, which write nothing of their own")
    return found


@dataclass(frozen=True)
class Overlap:
    """Of two adapters.

    heads: how many each has. shared: how many are in both. by_chance: how many would be, on average, if each had drawn
    its heads. jaccard: shared heads by all heads of either. cosine: the mean cosine of both offsets over the shared
    heads; None without any.
    """

    names: tuple[str, str]
    heads: tuple[int, int]
    shared: int
    by_chance: float
    jaccard: float
    cosine: float | None


def overlaps(adapters: Mapping[str, Mapping[Head, Tensor]], n_heads: int) -> list[Overlap]:
    """Every pair of adapters. adapters: name -> head -> its offset (D,). n_heads: of the whole base."""
    return [_overlap((a, b), (adapters[a], adapters[b]), n_heads) for a, b in combinations(adapters, 2)]


def _overlap(names: tuple[str, str], pair: Sequence[Mapping[Head, Tensor]], n_heads: int) -> Overlap:
    one, other = pair
    shared = one.keys() & other.keys()
    cosines = [nn.functional.cosine_similarity(one[h].float(), other[h].float(), dim=0).item() for h in shared]
    return Overlap(
        names,
        (len(one), len(other)),
        len(shared),
        len(one) * len(other) / n_heads,
        jaccard(list(one), list(other)),
        sum(cosines) / len(cosines) if cosines else None,
    )
