"""Whether a number of processes can share a model by whole heads, as a plan for tensor parallelism cuts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FUSED = {"qkv_proj", "query_key_value"}
# heads in words -> the setting that counts them, and projections that give a process some of them where they are cut
_HEADS = {
    "heads": ("num_attention_heads", {"q_proj", *_FUSED}),
    "heads of keys and values": ("num_key_value_heads", {"k_proj", "v_proj", *_FUSED}),
}


def check_heads(config: Any, plan: Mapping[str, str], n: int, who: str, whose: str = "") -> None:
    """Raise ValueError where a plan cuts by whole heads and n does not divide them.

    config: of the language model. plan: name -> style. who: the n, in words. whose: the heads are, in words.
    """
    cut = {name.rsplit(".", 1)[-1] for name, style in plan.items() if style == "colwise"}
    for kind, (setting, projections) in _HEADS.items():
        count = getattr(config, setting, None)
        if isinstance(count, int) and count % n and cut & projections:
            counts = (f"{getattr(config, name, None)} {heads}" for heads, (name, _) in _HEADS.items())
            raise ValueError(
                " ".join(filter(None, (f"{who} do not divide {count} {kind}", whose)))
                + f": tensor parallelism cuts by whole heads, expected a number that divides {' and '.join(counts)}"
            )
