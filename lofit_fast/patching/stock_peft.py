"""Offsets as an adapter that stock PEFT loads: W v is a constant that is added to the projection's output.

BEFT   y + beft_bias                        beft_bias = W v
LoRA   y + B A z + bias of B                A = 0, B = 0, bias = W v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lofit_fast.checksums import write_sums, written_sums
from lofit_fast.extras import needing
from lofit_fast.files import given_path, whole_folder
from lofit_fast.patching.adapter_places import check_no_model
from lofit_fast.patching.around_layer import check_nothing_around
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.mergeable import is_transposed, why_not_plain
from lofit_fast.patching.sharding import check_whole
from lofit_fast.patching.storage import CONFIG_FILE, TENSOR_FILE
from lofit_fast.patching.weight_sample import base_name
from lofit_kernels import fold_offset


@dataclass(frozen=True)
class PeftMethod:
    """config: the name of PEFT's class. options: what it is made with. tensors: by suffix, of a module's constant (N,)
    and K. transposed: whether PEFT takes a projection with its weight stored as (K, N).
    """

    config: str
    options: dict[str, Any]
    tensors: Callable[[Tensor, int], dict[str, Tensor]]
    transposed: bool


def _beft(constant: Tensor, inputs: int) -> dict[str, Tensor]:
    return {"beft_bias": constant[None]}


def _lora(constant: Tensor, inputs: int) -> dict[str, Tensor]:
    empty = {
        "lora_A.weight": torch.zeros(1, inputs, dtype=torch.float32),
        "lora_B.weight": torch.zeros(len(constant), 1, dtype=torch.float32),
    }
    return empty | {"lora_B.bias": constant}


PEFT_METHODS: dict[str, PeftMethod] = {
    "beft": PeftMethod("BeftConfig", {}, _beft, transposed=False),
    "lora": PeftMethod("LoraConfig", {"r": 1, "lora_alpha": 1, "lora_bias": True}, _lora, transposed=True),
}


@torch.no_grad()
def export_peft(handle: LofitHandle, folder: Path | str, *, peft_method: str = "beft") -> Path:
    """Write the offsets as an adapter folder of PEFT, which `PeftModel.from_pretrained` loads without this library.

    peft_method: "beft", a bias per projection, or "lora", for software that knows LoRA alone: matrices of zeros with
    `lora_bias`. The folder has W v in float32. W is that of the base in memory: the adapter fits no other base.
    Returns the folder. Raises ValueError for an unknown method, scales, vectors that act on answers alone, another
    adapter than the handle's own that is active, projections that are not plain, a model with other adapters around
    it, no name of a folder, or one with another adapter; ImportError without peft; OSError when the folder cannot be
    written. Nothing is left behind then.
    """
    if peft_method not in PEFT_METHODS:
        raise ValueError(f"expected peft_method to be one of {', '.join(PEFT_METHODS)}, got {peft_method!r}")
    folder = given_path(folder)
    with needing("peft", "peft", "an adapter for PEFT"):
        import peft
    method = PEFT_METHODS[peft_method]
    handle.check_live()
    handle.check_everywhere("export")
    handle.check_own("export")
    check_nothing_around(handle.layers, "export")
    check_whole(handle.model, "export")
    names = _names_of(handle)
    layers = handle.layers_with(handle.own_name, "export")
    constants = {names[number]: _constant(number, layer, method) for number, layer in layers.items()}
    if (folder / CONFIG_FILE).exists() and CONFIG_FILE not in written_sums(folder):
        raise ValueError(f"{folder} holds an adapter that lofit_fast.export has not written: choose another folder")
    check_no_model(folder)
    tensors = {
        f"base_model.model.{name}.{suffix}": tensor.contiguous().cpu()
        for name, (constant, inputs) in constants.items()
        for suffix, tensor in method.tensors(constant, inputs).items()
    }
    config = getattr(peft, method.config)(
        **method.options,
        target_modules=sorted(constants),
        task_type=_task(handle.model),
        base_model_name_or_path=base_name(handle.model) or None,
        inference_mode=True,
    )
    # without a config nobody takes the folder for an adapter
    with whole_folder(folder, last=CONFIG_FILE, withdraw=True) as scratch:
        save_file(tensors, scratch / TENSOR_FILE, metadata={"format": "pt"})
        config.save_pretrained(scratch)
        write_sums(scratch)
    return folder


def _names_of(handle: LofitHandle) -> dict[int, str]:
    """The projection's name in the model, by layer."""
    from transformers import PreTrainedModel

    model = handle.model
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"cannot export a {type(model).__name__} with other adapters around it: merge or unload them first"
        )
    return {p.layer: p.name for p in handle.projections if p.layer in handle.layers}


def _constant(number: int, layer: LofitLinear, method: PeftMethod) -> tuple[Tensor, int]:
    """(W v, K) of a layer's offsets: (N,), float32 or wider."""
    if layer.scale is not None:
        raise ValueError(
            f"cannot export scales for PEFT (layer {number} has some): they change a projection's weight, and what is "
            "written here is a bias. Use handle.merge(), or lofit_fast.export for transformers"
        )
    base: nn.Module = layer.inner
    if reason := why_not_plain(base):
        raise ValueError(f"cannot export layer {number} for PEFT: expected a plain nn.Linear, got {reason}")
    transposed = is_transposed(base)
    if transposed and not method.transposed:
        raise ValueError(
            f"cannot export layer {number} as BEFT, which takes nn.Linear only: it is a {type(base).__name__}. "
            "Use peft_method='lora'"
        )
    weight = base.weight.detach().to(layer.offset.dtype)
    rows = weight.T.contiguous() if transposed else weight
    constant = fold_offset(rows, layer.offset, layer.offset_heads)
    if not constant.isfinite().all():
        raise ValueError(f"cannot export layer {number}: W v is not finite")
    return constant.detach().clone(), rows.shape[1]


def _task(model: nn.Module) -> str | None:
    """PEFT's word for what the model's class is for; None where it has none."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_CLS" if name.endswith("ForSequenceClassification") else None
