"""Random stories for hypothesis: a model, and operations on it in any order; see `stories.py`."""

from __future__ import annotations

import importlib.util

import torch
from hypothesis import strategies as st

from tests.packed_linears import STAND_INS
from tests.proof.stories import OTHERS, WRAPPERS, Setting, heads_of
from tests.tiny_models import FAMILIES

# the linears that gradients pass through, and that are made in one dtype
_PACKED = tuple(name for name in STAND_INS if name not in ("float8-linear", "stripped"))
_DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
_SEEDS = st.integers(0, 3)


@st.composite
def settings_of_models(draw, compiled: bool = False) -> Setting:
    """A tiny model of any family; of the usual ones its sizes vary too, and something may be wrapped around it."""
    family = draw(st.sampled_from((*FAMILIES, *OTHERS)))
    dtype, seed = draw(st.sampled_from(_DTYPES)), draw(_SEEDS)
    if family not in FAMILIES:
        # the plain base of deepseek_v3 raises in float64, where its experts' products take no such matrix
        return Setting(family, torch.float32 if dtype == torch.float64 else dtype, seed)
    heads = draw(st.sampled_from((2, 4)))
    sizes = {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from((1, heads))),
        # Qwen2's is its hidden size over its heads
        **({} if family == "qwen2" else {"head_dim": draw(st.sampled_from((8, 16)))}),
    }
    if family == "qwen2":
        sizes["head_dim"] = 32 // heads
    installed = importlib.util.find_spec("peft") is not None
    wrappers = [name for name in (*WRAPPERS, *["compiled"] * compiled) if installed or name != "lora"]
    wrapper = draw(st.sampled_from(wrappers))
    if wrapper == "packed":
        # stand-ins round to float32's scales
        dtype = torch.float32
    return Setting(family, dtype, seed, tuple(sizes.items()), wrapper, draw(st.sampled_from(_PACKED)))


@st.composite
def stories(draw, compiled: bool = False, longest: int = 9) -> tuple[Setting, list[tuple]]:
    """A setting, and operations with their arguments; the first patches, so that most of the others have sense."""
    setting = draw(settings_of_models(compiled))
    heads = heads_of(setting)
    some = st.lists(st.sampled_from(heads), min_size=1, max_size=4, unique=True)
    component = st.one_of(st.none(), st.just("all"), some)
    configs = st.tuples(component, component).filter(any).map(lambda both: ("patch", *both))
    patches = st.tuples(configs, _SEEDS).map(lambda both: (*both[0], both[1]))
    others = st.one_of(
        *(st.just((name,)) for name in ("disable", "fold", "save", "unpatch", "merge", "export", "generate")),
        st.tuples(st.just("train"), _SEEDS),
        st.tuples(st.just("load"), _SEEDS),
    )
    first = draw(patches)
    return setting, [first, *draw(st.lists(st.one_of(patches, others), min_size=1, max_size=longest))]
