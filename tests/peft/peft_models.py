"""Tiny models with PEFT's adapters in them, put there in each of the ways that PEFT and transformers have."""

import warnings

import peft
import pytest
import torch
import transformers
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from tests.tiny_models import tiny_model

# the adapters that a model can have already, or get afterwards; built anew, since PEFT writes into a config
ADAPTERS = {
    "lora_qv": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "lora_o": lambda: LoraConfig(r=2, target_modules=["o_proj", "q_proj"]),
    "dora_o": lambda: LoraConfig(r=2, target_modules=["o_proj"], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"]),
    "loha_o": lambda: LoHaConfig(r=2, target_modules=["o_proj", "up_proj"]),
}
ENTRIES = ("get_peft_model", "add_adapter", "inject")


def enter(model: nn.Module, adapter: str, how: str = "get_peft_model") -> nn.Module:
    """PEFT enters the model, with numbers that matter. Returns what its user then holds."""
    config = ADAPTERS[adapter]()
    if how == "get_peft_model":
        held = get_peft_model(model, config)
    elif how == "add_adapter":
        add_adapter(model, config)
        held = model
    else:
        held = inject_adapter_in_model(config, model)
    fill(held)
    return held


def add_adapter(model: nn.Module, config: PeftConfig, *name: str) -> None:
    """By transformers' own method. Skips the test where this transformers wants a newer PEFT than there is."""
    try:
        model.add_adapter(config, *name)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}, PEFT {peft.__version__}: {error}")


@torch.no_grad()
def fill(model: nn.Module, seed: int = 3) -> None:
    """Move what is trainable away from where it computes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


def with_peft(adapter: str, how: str = "get_peft_model") -> nn.Module:
    """A tiny Llama that PEFT has entered, the same at each call."""
    model = tiny_model("llama")
    torch.manual_seed(5)
    return enter(model, adapter, how).eval()


def base_of(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, or the model itself."""
    return model.base_model.model if hasattr(model, "get_base_model") else model


def quietly(action, *args, **kwargs):
    """The result of something that PEFT or we warn about, rightly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action(*args, **kwargs)
