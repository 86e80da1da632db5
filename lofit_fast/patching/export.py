"""A plain model folder with the adapter merged in, which stock code loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lofit_fast.checksums import unchanged_files, write_sums, written_sums
from lofit_fast.files import given_path, whole_folder
from lofit_fast.patching.architectures import architecture_of, text_config
from lofit_fast.patching.around_layer import check_nothing_around
from lofit_fast.patching.fully_sharded import fully_sharded
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.merge import biases_needed, check_mergeable, merged_tensors
from lofit_fast.patching.mergeable import why_not_dense
from lofit_fast.patching.server_support import check_served
from lofit_fast.patching.sharding import check_whole
from lofit_fast.patching.stock import Stock, ties, with_biases, with_ties_of
from lofit_fast.patching.storage import CONFIG_FILE
from lofit_fast.patching.weight_sample import base_name
from lofit_fast.patching.whole_copy import with_whole_copy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# files of weights that stock code would rather load than those written beside them
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


@torch.no_grad()
def export(
    handle: LofitHandle,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    server: str | None = None,
) -> Path:
    """Write the merged model as a folder that stock `from_pretrained` loads; the handle lives on.

    The folder is for the model's own class, with a bias switched on in its config where the offsets need one. Families
    whose code has no such switch are written for the family that computes the same with one (Mistral and Qwen2 as
    Llama). Tied tensors that have come to differ are written apart.
    tokenizer: saved beside the model when given, in place of all that an earlier export has written there.
    server: a key of `SERVERS`, whose code has to keep the offsets of the folder's class too.
    Returns the folder, which holds the checksums of all its files too, for `verify_export` and `load_model`. Of a model
    that FSDP2 shards all processes must call it, see `with_whole_copy`.
    Raises ValueError when the family, or the server, cannot carry the offsets, the base is not plain, or the folder
    holds a model that is no export; OSError when the folder cannot be written. Nothing is left behind then.
    """
    handle.check_live()
    handle.check_everywhere("export")
    check_nothing_around(handle.layers, "export")
    folder = given_path(folder)
    if fully_sharded(handle.model):
        return with_whole_copy(handle, folder, lambda copy: export(copy, folder, tokenizer, server))
    check_whole(handle.model, "export")
    plain = plain_model(handle)
    if server is not None:
        check_served(server, type(plain), any(layer.offset is not None for layer in handle.layers.values()))
    check_folder(handle, folder)
    # a tokenizer reads files of another one too, its chat template for one
    earlier = unchanged_files(folder, but="*.safetensors")
    gone, kept = ((), earlier) if tokenizer is None else (earlier, None)
    # without a config nobody takes the folder for a model
    with whole_folder(folder, last="config.json", withdraw=True, instead_of=gone) as scratch:
        plain.save_pretrained(scratch)
        _write_generation_config(handle.model, scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        _check_stale(folder, scratch)
        write_sums(scratch, beside=kept)
    return folder


@torch.no_grad()
def plain_model(handle: LofitHandle) -> nn.Module:
    """The merged model as stock code has it, which shares all unchanged tensors with the patched one.

    Buffers that no folder holds are left on the meta device. Raises ValueError as `export` does.
    """
    from transformers import PreTrainedModel

    handle.check_everywhere("export")
    handle.check_own("export")
    check_nothing_around(handle.layers, "export")
    model = handle.model
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"cannot export a {type(model).__name__} with other adapters around it: merge or unload them first"
        )
    check_mergeable(model, handle.layers, in_place=False)
    stock = _stock_of(handle)
    state = _completed(model, stock, merged_state(handle))
    stock = with_ties_of(stock, state)
    plain = stock.build()
    _fill(plain, state)
    # how the checkpoint that the base came from names its tensors
    if type(plain) is type(model) and hasattr(model, "_weight_conversions"):
        plain._weight_conversions = model._weight_conversions
    return plain


def merged_state(handle: LofitHandle) -> dict[str, Tensor]:
    """The whole model's state with W' and b' in place."""
    state = handle.model.state_dict()
    # a module may be known under several names
    names: dict[nn.Module, list[str]] = {}
    for name, module in handle.model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for layer in handle.layers.values():
        weight, bias = merged_tensors(layer)
        for name in names[layer]:
            state[f"{name}.weight"] = weight
            if bias is not None:
                state[f"{name}.bias"] = bias
    return state


def _stock_of(handle: LofitHandle) -> Stock:
    """The config and class of the exported model, whose code has a bias wherever the offsets need one."""
    model = handle.model
    stock = Stock(model.config, type(model)).changed(_forget_quantization)
    needed = biases_needed(handle.layers, handle.projections)
    if not needed:
        return stock
    biased = with_biases(stock, needed)
    if biased is None:
        kin = architecture_of(model).export_as
        biased = kin and with_biases(_as_family(stock, kin), needed)
    if biased is None:
        raise ValueError(
            f"cannot export offsets for model_type {text_config(model).model_type!r}: no switch known here gives its "
            "code a bias on the output projection, and no family that computes the same with one is. "
            "Use handle.merge() and keep the model in memory, or ship the adapter folder"
        )
    return biased.stock


def _as_family(stock: Stock, kin: str) -> Stock:
    """The same model for the code of another family. Raises ValueError where that would compute something else."""
    from transformers import AutoConfig

    text = stock.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    if slides and window is not None and window < text.max_position_embeddings:
        raise ValueError(
            f"cannot export {text.model_type} as {kin}: its attention slides over {window} tokens of "
            f"{text.max_position_embeddings}, which {kin} does not do"
        )
    known = vars(AutoConfig.for_model(kin)).keys()
    kept = {k: v for k, v in text.to_dict().items() if k in known and k not in ("model_type", "architectures")}
    target = AutoConfig.for_model(kin, **kept)
    if text is stock.config:
        return Stock(target, _class_for(stock, target))
    part = next(name for name in stock.config.sub_configs if getattr(stock.config, name, None) is text)
    return stock.changed(lambda config: setattr(config, part, target))


def _class_for(stock: Stock, config: Any) -> type:
    """The class that is to the config's family what the model's is to its own: with the same head."""
    import transformers

    own, other = type(stock.config).__name__, type(config).__name__
    name = stock.model_class.__name__.replace(own.removesuffix("Config"), other.removesuffix("Config"))
    if not hasattr(transformers, name):
        raise ValueError(f"cannot export a {stock.model_class.__name__} as {config.model_type}: there is no {name}")
    return getattr(transformers, name)


def _completed(model: nn.Module, stock: Stock, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the stock model: this one, with zeros for the biases that it lacks.

    Raises ValueError where more than that is missing, something is too much, or is no plain numbers.
    """
    expected, name = stock.build().state_dict(), stock.model_class.__name__
    quantized = getattr(model.config, "quantization_config", None) is not None
    advice = "load the base unquantized" if quantized else "export is for models as stock code builds them"
    like = next(t for t in state.values() if t.is_floating_point())
    whole = dict(state)
    for key in expected.keys() - state.keys():
        if not key.endswith(".bias"):
            raise ValueError(f"cannot export: {name} has a {key}, which this model lacks; {advice}")
        beside = state.get(f"{key.removesuffix('.bias')}.weight", like)
        whole[key] = torch.zeros(expected[key].shape, dtype=beside.dtype, device=beside.device)
    if foreign := sorted(state.keys() - expected.keys()):
        raise ValueError(f"cannot export: the model has a {foreign[0]}, which {name} lacks; {advice}")
    for key, tensor in state.items():
        reason = why_not_dense(tensor) if expected[key].is_floating_point() and expected[key].numel() else None
        if reason:
            raise ValueError(f"cannot export: {key} is {reason}; {advice}")
        if tensor.shape != expected[key].shape:
            shape, other = tuple(tensor.shape), tuple(expected[key].shape)
            raise ValueError(f"cannot export: {key} is of shape {shape}, by the model's config {other}")
    return whole


def _fill(plain: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the tensors into the model, where nothing shares memory but what its config ties."""
    tied = {target for target, _ in ties(plain)}
    seen: set[int] = set()
    whole = {}
    for key, tensor in state.items():
        again = tensor.numel() > 0 and tensor.data_ptr() in seen
        whole[key] = tensor.clone() if again and key not in tied else tensor
        seen.add(tensor.data_ptr())
    plain.load_state_dict(whole, assign=True)
    plain.tie_weights()


def _write_generation_config(model: nn.Module, folder: Path) -> None:
    """The base's own, in place of the one that transformers has made from the config."""
    path = folder / "generation_config.json"
    if path.exists() and getattr(model, "generation_config", None) is not None:
        # not save_pretrained, which refuses what from_pretrained has read: a temperature without do_sample
        model.generation_config.to_json_file(path)


def _forget_quantization(config: Any) -> None:
    # what was quantized once is plain numbers now, or is refused
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config


def check_folder(handle: LofitHandle, folder: Path) -> None:
    """Raise ValueError for a folder that the plain model must not go to."""
    if (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"{folder} holds an adapter, which would be taken for a part of the model: choose another folder"
        )
    base = base_name(handle.model)
    if base and folder.exists() and Path(base).exists() and folder.samefile(base):
        raise ValueError(f"{folder} is the folder of the base model, which would be lost: choose another folder")
    # a base that does not say where it comes from, or says it from another folder, is none of our exports either
    if theirs := _weights_in(folder) - written_sums(folder).keys():
        raise ValueError(
            f"{folder} holds weights of another model ({min(theirs)}), which lofit_fast.export has not written: choose "
            "another folder"
        )


def _weights_in(folder: Path) -> set[str]:
    return {path.name for kind in _WEIGHTS for path in folder.glob(kind)}


def _check_stale(folder: Path, scratch: Path) -> None:
    """Raise ValueError where weights of another model would be loaded instead of, or beside, the new ones."""
    stale = _weights_in(folder) - {path.name for path in scratch.iterdir()}
    if stale:
        raise ValueError(f"{folder} holds weights of another model ({min(stale)}): choose another folder")
