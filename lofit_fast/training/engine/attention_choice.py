"""Which attention implementation training uses where that is left to us. A rule, for attention moves the last bits."""

from __future__ import annotations

import torch
from torch import nn

from lofit_fast.data.pack import GROUPED
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.families import ARCHITECTURES
from lofit_fast.training.engine.cpu_extras import HAS_CPU_EXTRAS


def best_attention(model: nn.Module, device: torch.device) -> str:
    """GROUPED on a CPU for the families of the table, the attention that the model has elsewhere."""
    config = text_config(model)
    grouped = device.type == "cpu" and HAS_CPU_EXTRAS and config.model_type in ARCHITECTURES
    return GROUPED if grouped else config._attn_implementation
