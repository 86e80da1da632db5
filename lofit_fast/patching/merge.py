"""Merging: offsets into the projection's bias, scales into the weight's columns. A merged model is a plain model.

W' = W diag(1 + a)        b' = b + W v
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lofit_fast.files import whole_folder
from lofit_fast.patching.architectures import Projection, architecture_of, text_config
from lofit_fast.patching.layer import LofitLinear, eval_mode
from lofit_fast.patching.storage import CONFIG_FILE
from lofit_kernels import fold_offset

if TYPE_CHECKING:
    from lofit_fast.patching.handle import LofitHandle

# largest difference of logits over their largest magnitude; a 16-bit model rounds its merged weights once more
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class ExportReport:
    """What `verify_export` saw: differences of logits, each the maximum over the maximum magnitude.

    difference: exported against patched; base_difference: the untouched base against patched, the adapter's effect.
    """

    difference: float
    base_difference: float
    tolerance: float


@torch.no_grad()
def merged_tensors(layer: LofitLinear) -> tuple[Tensor, Tensor | None]:
    """(W', b') of one projection in the base layer's dtype, detached; b' is None without a base bias and offsets."""
    base = layer.base_layer
    weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
    if layer.offset is not None:
        bias = fold_offset(weight, layer.offset, layer.offset_heads, bias).to(weight.dtype)
    if layer.scale is not None:
        columns = weight.to(layer.scale.dtype).unflatten(1, (layer.n_heads, layer.head_dim))
        gain = torch.ones_like(columns[0]).index_add_(0, layer.scale_heads, layer.scale)
        weight = (columns * gain).flatten(1).to(base.weight.dtype)
    return weight, bias


def check_mergeable(handle: LofitHandle) -> None:
    """Raise ValueError unless every linear that merging changes is a plain nn.Linear with floating weights."""
    for number, layer in handle.layers.items():
        base = layer.base_layer
        if type(base) is not nn.Linear or not base.weight.is_floating_point() or base.weight.layout != torch.strided:
            raise ValueError(
                f"cannot merge layer {number}: expected a plain nn.Linear, got {type(base).__name__}; "
                "merge or dequantize the base first"
            )
    if _needs_bias_flag(handle) and architecture_of(handle.model).bias_flag:
        for projection, name in _flagged(handle):
            linear = getattr(projection.parent, name)
            if type(linear) not in (nn.Linear, LofitLinear):
                raise ValueError(
                    f"cannot merge offsets: layer {projection.layer}'s {name} needs a bias beside them, but is a "
                    f"{type(linear).__name__}; merge its adapters first"
                )


@torch.no_grad()
def merge_into_base(handle: LofitHandle) -> None:
    """Write W' and b' into the base layers, and set the config so that the model reloads with its biases.

    The handle has given the base layers back to the model already.
    """
    architecture, flagged = architecture_of(handle.model), _needs_bias_flag(handle)
    for layer in handle.layers.values():
        weight, bias = merged_tensors(layer)
        base = layer.base_layer
        base.weight.copy_(weight)
        if base.bias is not None:
            base.bias.copy_(bias)
        elif bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=base.weight.requires_grad)
    if flagged and architecture.bias_flag is None:
        warnings.warn(
            f"the merged model is right in memory, but the code of {text_config(handle.model).model_type!r} has no "
            "output-projection bias: saved and reloaded, it would lose the offsets. Use lofit_fast.export for that",
            stacklevel=3,
        )
    if not flagged or architecture.bias_flag is None:
        return
    for projection, name in _flagged(handle):
        linear = getattr(projection.parent, name)
        if linear.bias is None:
            linear.bias = nn.Parameter(_zero_bias(linear), requires_grad=linear.weight.requires_grad)
    setattr(text_config(handle.model), architecture.bias_flag, True)


@torch.no_grad()
def export(handle: LofitHandle, folder: Path | str, tokenizer=None) -> Path:
    """Write the merged model as a folder that stock `AutoModelForCausalLM.from_pretrained` loads; the handle lives on.

    Families whose code has no output-projection bias are written for the family that computes the same with one
    (Mistral and Qwen2 as Llama). tokenizer: saved beside the model when given. Returns the folder.
    Raises ValueError when the family cannot carry the offsets, or the base is not plain; OSError when the folder
    cannot be written. Nothing is left behind then.
    """
    handle.check_live()
    check_mergeable(handle)
    if (Path(folder) / CONFIG_FILE).exists():
        raise ValueError(
            f"{folder} holds an adapter, which would be taken for a part of the model: choose another folder"
        )
    config, model_class = _plain_config(handle)
    with torch.device("meta"):
        plain = model_class(config)
    plain.load_state_dict(_merged_state(handle), assign=True)
    plain.tie_weights()
    if getattr(handle.model, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(handle.model.generation_config)
    with whole_folder(folder) as scratch:
        plain.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return Path(folder)


@torch.no_grad()
def verify_export(handle: LofitHandle, folder: Path | str, tokens: Tensor | None = None) -> ExportReport:
    """Prove an exported folder: reload it with stock code and compare its logits with the live patched model's.

    tokens: (B, S) int64, or None for 2 x 16 fixed random ones. Returns what was seen.
    Raises ValueError when the logits differ by more than rounding, or are closer to the base model's: then the
    loading code has dropped the offsets.
    """
    from transformers import AutoModelForCausalLM

    handle.check_live()
    model = handle.model
    if tokens is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, text_config(model).vocab_size, (2, 16), generator=generator)
    device, dtype = next(model.parameters()).device, next(iter(handle.layers.values())).weight.dtype
    tokens = tokens.to(device)
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    with eval_mode(model):
        patched = model(tokens).logits.double()
        with handle.disabled():
            base = model(tokens).logits.double()
    size = patched.abs().max()
    difference = ((exported(tokens).logits.double() - patched).abs().max() / size).item()
    base_difference = ((base - patched).abs().max() / size).item()
    report = ExportReport(difference, base_difference, TOLERANCE[dtype])
    # an adapter too small to tell from rounding cannot be told from a dropped one either
    dropped = base_difference > report.tolerance and difference > base_difference / 2
    if not difference <= report.tolerance or dropped:
        raise ValueError(f"the exported model in {folder} does not compute what the patched one does: {report}")
    return report


def _needs_bias_flag(handle: LofitHandle) -> bool:
    """Whether merging adds a bias where the base has none."""
    return any(layer.offset is not None and layer.base_layer.bias is None for layer in handle.layers.values())


def _flagged(handle: LofitHandle) -> Iterator[tuple[Projection, str]]:
    """(projection, name beside it) of every linear that the family's bias flag gives a bias, in every layer."""
    for projection in handle.projections:
        for name in (*architecture_of(handle.model).biased_siblings, projection.attribute):
            yield projection, name


def _zero_bias(linear: nn.Module) -> Tensor:
    return torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)


def _merged_state(handle: LofitHandle) -> dict[str, Tensor]:
    """The whole model's state with W' and b' in place, and zeros where the bias flag asks for more biases."""
    state = handle.model.state_dict()
    names = {p.layer: p.name for p in handle.projections}
    for number, layer in handle.layers.items():
        weight, bias = merged_tensors(layer)
        state[f"{names[number]}.weight"] = weight
        if bias is not None:
            state[f"{names[number]}.bias"] = bias
    if _needs_bias_flag(handle):
        for projection, name in _flagged(handle):
            owner = projection.name.rpartition(".")[0]
            state.setdefault(f"{owner}.{name}.bias", _zero_bias(getattr(projection.parent, name)))
    return state


def _plain_config(handle: LofitHandle):
    """The config and class of the exported model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

    model, architecture = handle.model, architecture_of(handle.model)
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"cannot export a {type(model).__name__} with other adapters around it: merge or unload them first"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"cannot export a {type(model).__name__}: expected a causal language model")
    config = copy.deepcopy(model.config)
    if not _needs_bias_flag(handle):
        return config, type(model)
    if architecture.bias_flag:
        setattr(config.get_text_config(), architecture.bias_flag, True)
        return config, type(model)
    if architecture.export_as is None:
        raise ValueError(
            f"cannot export offsets for model_type {config.model_type!r}: its code has no output-projection bias. "
            "Use handle.merge() and keep the model in memory, or ship the adapter folder"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"cannot export {config.model_type} as {architecture.export_as}: its attention slides over {window} "
            f"tokens of {config.max_position_embeddings}, which {architecture.export_as} does not do"
        )
    known = vars(AutoConfig.for_model(architecture.export_as)).keys()
    kept = {k: v for k, v in config.to_dict().items() if k in known and k not in ("model_type", "architectures")}
    target = AutoConfig.for_model(architecture.export_as, **{**kept, "attention_bias": True})
    return target, MODEL_FOR_CAUSAL_LM_MAPPING[type(target)]
