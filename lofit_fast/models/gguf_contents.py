"""What is in a GGUF file that transformers' reader would leave out without a word: told to the config, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lofit_fast.extras import needing
from lofit_fast.patching.stock import Stock, with_biases

# metadata that transformers does not read for every family, and what it calls it. after the architecture's name
_ENTRIES = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# metadata that changes what is computed unless it is one of these, which transformers never reads
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
}
# one factor per frequency, by which it is divided
_ROPE_FACTORS = "rope_freqs.weight"
# of all models with such factors so far; the file holds the factors alone
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_NAMED = 3


@dataclass(frozen=True)
class GgufContents:
    """What a GGUF file says that it holds.

    path: the file. architecture: its name for the family. metadata: its numbers and texts under that name, without it.
    tensors: the names of all tensors. rope_factors: (D/2,), the divisors of RoPE's frequencies, None without any.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    tensors: tuple[str, ...]
    rope_factors: Tensor | None

    def completed(self, config: Any, model_class: type) -> Any:
        """A config, as transformers reads it from the file, with what it has not read: biases and scaled positions.

        Raises ValueError, naming the entry or the tensors, for what the family's code cannot do.
        """
        stock = Stock(self._with_rope(self._with_metadata(config)), model_class)
        plain = stock.build()
        if lacking := self._lacking(plain):
            biased = with_biases(stock, [module for _, module in lacking])
            if biased is None:
                raise self._refusal([tensor for tensor, _ in lacking], f"{model_class.__name__} has no place for them")
            stock, plain = biased.stock, biased.stock.build()
        if unread := self._unread(plain):
            raise self._refusal(unread, f"{model_class.__name__} has no place for them")
        return stock.config

    @torch.no_grad()
    def check_loaded(self, model: nn.Module, missing: set[str], unexpected: set[str]) -> None:
        """Raise ValueError unless all that the file holds is in the model, and the model has nothing besides.

        missing, unexpected: what transformers says of its loading. Biases that the file lacks, beside others that it
        has, are set to zero.
        """
        if unexpected:
            raise self._refusal(sorted(unexpected), f"{type(model).__name__} has no place for them")
        parameters = dict(model.named_parameters())
        for name in missing:
            if not name.endswith(".bias"):
                raise ValueError(f"{self.path} lacks {name} of a {type(model).__name__}")
            parameters[name].zero_()

    def _with_metadata(self, config: Any) -> Any:
        for entry, attribute in _ENTRIES.items():
            value = self.metadata.get(entry)
            if value is None or entry in _read_by_transformers(self.architecture) or not hasattr(config, attribute):
                continue
            if getattr(config, attribute) != value:
                setattr(config, attribute, value)
        for entry, neutral in _NEUTRAL.items():
            value = self.metadata.get(entry, neutral[0])
            if entry not in _read_by_transformers(self.architecture) and value not in neutral:
                raise ValueError(
                    f"{self.path} cannot be loaded: transformers does not read its {self.architecture}.{entry} = "
                    f"{value}, and would compute something else"
                )
        return config

    def _with_rope(self, config: Any) -> Any:
        kind = self.metadata.get("rope.scaling.type", "none")
        if self.architecture == "gpt-oss" or (kind == "none" and self.rope_factors is None):
            return config
        # a family without RoPE has no use for either
        if kind == "linear" and self.rope_factors is None and getattr(config, "rope_parameters", None):
            factor = float(self.metadata.get("rope.scaling.factor", 1.0))
            return _scaled(config, {"rope_type": "linear", "factor": factor})
        if kind != "none":
            raise ValueError(
                f"{self.path} cannot be loaded: transformers does not read how its positions are scaled "
                f"({self.architecture}.rope.scaling.type = {kind!r}), and would compute something else"
            )
        # a family whose config scales them already, as Gemma 4's does, has the factors from there
        if bool((self.rope_factors == 1).all()) or _scales_already(config):
            return config
        if "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
            raise self._refusal([_ROPE_FACTORS], f"a {config.model_type} has no place for them")
        scaled = _scaled(config, {"rope_type": "llama3", "factor": round(self.rope_factors.max().item(), 3), **_LLAMA3})
        if not _gives(scaled, self.rope_factors):
            raise self._refusal([_ROPE_FACTORS], "they are not the factors of Llama 3, the only ones known here")
        return scaled

    def _lacking(self, model: nn.Module) -> list[tuple[str, str]]:
        """(tensor, module) of the biases in the file whose modules, in transformers' code, have none."""
        import gguf

        number = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        if number is None:
            return []
        names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
        without = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is None]
        found = ((f"{names.get_name(name)}.bias", name) for name in without)
        return [(tensor, name) for tensor, name in found if tensor in self.tensors]

    def _unread(self, model: nn.Module) -> list[str]:
        """The tensors that transformers' older reader, which passes over what it does not know, has no name for."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        if _has_newer_reader(self.architecture):
            return []
        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=model.config.to_dict())
        known = get_gguf_hf_weights_map(model, processor).keys()
        # the factors of RoPE are in the config by now. experts are known without the suffix
        return [
            name
            for name in self.tensors
            if name != _ROPE_FACTORS and not known & {name, name.removesuffix(".weight"), name.removesuffix(".bias")}
        ]

    def _refusal(self, tensors: list[str], reason: str) -> ValueError:
        shown = ", ".join(tensors[:_NAMED]) + (", ..." if len(tensors) > _NAMED else "")
        return ValueError(
            f"{self.path} cannot be loaded whole: transformers would leave out {len(tensors)} of its tensors ({shown}) "
            f"without a word, and compute something else; {reason}"
        )


def contents_of(path: Path) -> GgufContents:
    """Read a GGUF file's own description. Raises ValueError for a file of several parts, ImportError without gguf."""
    with needing("gguf", "train", "reading GGUF files"):
        import gguf  # noqa: F401
    # not gguf's reader, which takes half a minute for a vocabulary of 262k
    from transformers.integrations.gguf.reader import read_gguf_metadata

    entries, tensors = read_gguf_metadata(str(path))
    if entries.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one of {entries['split.count']} parts: expected a model in one file")
    architecture = str(entries["general.architecture"])
    metadata = {
        name.removeprefix(f"{architecture}."): value
        for name, value in entries.items()
        if name.startswith(f"{architecture}.") and not isinstance(value, list)
    }
    factors = _factors_in(path) if _ROPE_FACTORS in tensors else None
    return GgufContents(path, architecture, metadata, tensors, factors)


def _factors_in(path: Path) -> Tensor:
    """The divisors of RoPE's frequencies."""
    from gguf import GGUFReader, dequantize

    found = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == _ROPE_FACTORS)
    return torch.tensor(dequantize(found.data, found.tensor_type)).double()


def _read_by_transformers(architecture: str) -> set[str]:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    # "qwen2moe" in the file, "qwen2_moe" there
    spelled = architecture.replace("-", "_").replace("moe", "_moe").replace("__", "_")
    rows = GGUF_CONFIG_MAPPING.get(architecture) or GGUF_CONFIG_MAPPING.get(spelled) or {}
    return {entry for entry, name in rows.items() if name is not None}


def _has_newer_reader(architecture: str) -> bool:
    """Whether transformers reads the family by code that says itself which tensors it does not know."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        # older releases
        return False
    return is_gguf_arch_supported(architecture)


def _scales_already(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope.get("rope_type")] + [row.get("rope_type") for row in rope.values() if isinstance(row, dict)]
    return any(kind not in (None, "default") for kind in kinds)


def _scaled(config: Any, scaling: dict[str, Any]) -> Any:
    """The config with its positions scaled, and the same base of its frequencies; in layers that see everything."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        rope["full_attention"] = {"rope_theta": rope["full_attention"]["rope_theta"], **scaling}
    else:
        config.rope_parameters = {"rope_theta": rope["rope_theta"], **scaling}
    return config


def _gives(config: Any, factors: Tensor) -> bool:
    """Whether transformers divides RoPE's frequencies by these factors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    got = config.rope_parameters["rope_theta"] ** -exponents / scaled.double()
    return got.shape == factors.shape and torch.allclose(got, factors, rtol=1e-4, atol=0)
