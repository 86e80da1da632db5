"""LoFiT on a tiny model by PEFT's calls, and its twin by ours."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn

import lofit_fast as lf
from lofit_fast.peft import LofitPeftConfig
from tests.patched_models import CONFIGS
from tests.peft.peft_models import base_of
from tests.tiny_models import tiny_model


def peft_config(name: str, **more) -> LofitPeftConfig:
    config = CONFIGS[name]
    return LofitPeftConfig(scale=config.scale, offset=config.offset, task_type="CAUSAL_LM", **more)


def adapted(name: str = "both", family: str = "llama", dtype: torch.dtype = torch.float32) -> PeftModel:
    return get_peft_model(tiny_model(family, dtype), peft_config(name)).eval()


def vectors(model: nn.Module, adapter: str = "default") -> dict[tuple[int, str], nn.Parameter]:
    layers = base_of(model).model.layers
    found = {}
    for number, layer in enumerate(layers):
        projection = layer.self_attn.o_proj
        for component in ("scale", "offset"):
            table = getattr(projection, f"lofit_{component}", {})
            if adapter in table:
                found[number, component] = table[adapter]
    return found


def twin_of(model: nn.Module, name: str = "both", family: str = "llama", dtype: torch.dtype = torch.float32):
    """The same by `lofit_fast.patch`, with the same vectors."""
    handle = lf.patch(tiny_model(family, dtype), CONFIGS[name])
    with torch.no_grad():
        for (component, number), rows in handle.vectors().items():
            rows.copy_(vectors(model)[number, component])
    return handle


def spoilt(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(iter(vectors(model).values())).fill_(float("nan"))
    return model
