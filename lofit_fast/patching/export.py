"""A plain model folder with the adapter merged in, and the proof that stock code computes the same from it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lofit_fast.files import whole_folder
from lofit_fast.patching.architectures import architecture_of, text_config
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.layer import eval_mode
from lofit_fast.patching.merge import check_mergeable, flagged, merged_tensors, needs_bias_flag, zero_bias
from lofit_fast.patching.sharding import check_whole
from lofit_fast.patching.storage import CONFIG_FILE

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
def export(handle: LofitHandle, folder: Path | str, tokenizer=None) -> Path:
    """Write the merged model as a folder that stock `AutoModelForCausalLM.from_pretrained` loads; the handle lives on.

    Families whose code has no output-projection bias are written for the family that computes the same with one
    (Mistral and Qwen2 as Llama). tokenizer: saved beside the model when given. Returns the folder.
    Raises ValueError when the family cannot carry the offsets, or the base is not plain; OSError when the folder
    cannot be written. Nothing is left behind then.
    """
    handle.check_live()
    check_whole(handle.model, "export")
    check_mergeable(handle.model, handle.layers, handle.projections)
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


def _merged_state(handle: LofitHandle) -> dict[str, Tensor]:
    """The whole model's state with W' and b' in place, and zeros where the bias flag asks for more biases."""
    state = handle.model.state_dict()
    names = {p.layer: p.name for p in handle.projections}
    for number, layer in handle.layers.items():
        weight, bias = merged_tensors(layer)
        state[f"{names[number]}.weight"] = weight
        if bias is not None:
            state[f"{names[number]}.bias"] = bias
    if needs_bias_flag(handle.layers):
        for projection, name in flagged(handle.model, handle.projections):
            owner = projection.name.rpartition(".")[0]
            state.setdefault(f"{owner}.{name}.bias", zero_bias(getattr(projection.parent, name)))
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
    if not needs_bias_flag(handle.layers):
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
