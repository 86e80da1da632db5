"""Loading a base that the processes of a run hold together: which can be cut so, and what transformers is told."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn

from lofit_fast import ranks
from lofit_fast.models.whole_heads import check_heads
from lofit_fast.patching.tensor_parallel import is_tensor_parallel

# what transformers cuts models with; earlier releases did so in another way
_CUTS_WITH = "transformers.distributed.tensor_parallel"


def check_spread(name: str, device: torch.device) -> None:
    """Raise ValueError where this process or device cannot take part in tensor parallelism, before a base is loaded.

    name: of the base. Joins the processes that a launcher has started this one with.
    Raises ImportError for a transformers that does not cut models as is known here, and what `ranks.begun` raises.
    """
    if find_spec(_CUTS_WITH) is None:
        raise ImportError(
            f"transformers {transformers.__version__} has no {_CUTS_WITH}, which tensor parallelism needs: pip install "
            "-U transformers"
        )
    ranks.begun()
    if ranks.count() == 1:
        raise ValueError(
            f"tensor parallelism cuts {name} over several processes, and this is one by itself: start N of them with "
            "torchrun --nproc-per-node N -m lofit_fast.cli ... (docs/scaling_out.md)"
        )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = "cpu" if accelerator is None else accelerator.type
    if device.type != there:
        raise ValueError(
            f"transformers cuts a model over devices of type {there} here, got the device {device}: expected {there}, "
            "or processes that see no accelerator"
        )


def check_cut(name: str, model: nn.Module) -> None:
    """Raise ValueError for a loaded base of which this process has all: its plan has cut nothing."""
    if not is_tensor_parallel(model):
        raise ValueError(
            f"transformers has cut nothing of {name} ({type(model).__name__}) over {ranks.count()} processes: train "
            "data-parallel, or with FSDP2 (docs/scaling_out.md)"
        )


def spread(name: str, config: Any, quantized: bool) -> dict[str, Any]:
    """What `from_pretrained` is to be told, so that each process loads its part of the base.

    name, config: of the base.
    Raises ValueError for a quantized base, a family that transformers has no plan for, and processes that do not divide
    the heads.
    """
    from transformers.distributed import DistributedConfig

    if quantized:
        raise ValueError(f"cannot cut {name} over processes: it is quantized. Expected a base of dense weights")
    text, n = config.get_text_config(), ranks.count()
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"transformers has no plan for tensor parallelism of the type {text.model_type!r}, of which {name} is: "
            "train data-parallel, or with FSDP2 (docs/scaling_out.md)"
        )
    check_heads(text, plan, n, f"{n} processes", f"of {name}")
    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=n)}
