"""Where the output projection of each model family is, as data. Adding a family is adding a row and its test.

Nothing here imports transformers: a model is a tree of named modules with a `config`.
"""

import re
from dataclasses import asdict, dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One family.

    model_type: the config's name for it. projection: the output projection's path inside a layer.
    bias_flag: the config attribute that gives the projection a bias, and `biased_siblings` one too; None if the
    family hard-codes it away. export_as: the model_type whose stock code computes the same with such a bias.
    ffn: the feed-forward block's path inside a layer.
    """

    model_type: str
    projection: str = "self_attn.o_proj"
    bias_flag: str | None = "attention_bias"
    biased_siblings: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    export_as: str | None = None
    ffn: str = "mlp"


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama"),
        Architecture("gemma"),
        Architecture("gemma2"),
        Architecture("gemma3_text"),
        Architecture("qwen3"),
        Architecture("mistral", bias_flag=None, export_as="llama"),
        Architecture("qwen2", bias_flag=None, export_as="llama"),
    )
}

# families without a row: a linear called o_proj whose inputs are heads x head_dim; merged in memory, not exported
GENERIC = Architecture("*", bias_flag=None)


@dataclass(frozen=True)
class Projection:
    """One output projection found in a model: `parent.<attribute>` is `module`, in decoder layer `layer`."""

    layer: int
    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module
    n_heads: int
    head_dim: int


@dataclass(frozen=True)
class Fingerprint:
    """The shape of a base model, as far as an adapter depends on it."""

    model_type: str
    layers: int
    heads: int
    head_dim: int
    hidden: int

    def as_dict(self) -> dict[str, str | int]:
        """Plain data, for adapter_config.json."""
        return asdict(self)


def architecture_of(model: nn.Module) -> Architecture:
    """The row of the model's family, or the generic one."""
    return ARCHITECTURES.get(text_config(model).model_type, GENERIC)


def text_config(model: nn.Module):
    """The config that describes the decoder: the model's own, or its text part. Raises TypeError without one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise TypeError(f"expected a Hugging Face model with a config, got {type(model).__name__}")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_projections(model: nn.Module) -> list[Projection]:
    """Every output projection of the decoder, by ascending layer.

    Raises TypeError for something that is no Hugging Face model, ValueError, naming what was looked for, where no
    projection or none of heads x head_dim inputs is found.
    """
    config, path = text_config(model), architecture_of(model).projection
    pattern = re.compile(rf"(?:^|\.)layers\.(\d+)\.{re.escape(path)}$")
    found = [(int(m.group(1)), name) for name, _ in model.named_modules() if (m := pattern.search(name))]
    if not found:
        raise ValueError(
            f"{type(model).__name__} (model_type {config.model_type!r}) is not supported: looked for a linear at "
            f"'layers.<n>.{path}' with heads x head_dim inputs and found none"
        )
    layers = [layer for layer, _ in found]
    if len(set(layers)) != len(layers):
        raise ValueError(f"{type(model).__name__} has several decoders ({len(layers)} projections): pass one of them")
    return [_projection(model, config, layer, name) for layer, name in sorted(found)]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """All of the decoder's layers, in order, those without a projection too. Raises as `find_projections` does."""
    name = find_projections(model)[0].name.split(".")
    return list(model.get_submodule(".".join(name[: name.index("layers") + 1])))


def _projection(model: nn.Module, config, layer: int, name: str) -> Projection:
    parent_name, _, attribute = name.rpartition(".")
    parent, module = model.get_submodule(parent_name), model.get_submodule(name)
    inputs = getattr(module, "in_features", None)
    n_heads = config.num_attention_heads
    head_dim = getattr(parent, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // n_heads
    # families with heads that vary by layer: the inputs decide
    if isinstance(n_heads, list | tuple):
        n_heads = n_heads[layer]
    if inputs != n_heads * head_dim:
        raise ValueError(
            f"{name}: expected a linear of {n_heads} heads x {head_dim} = {n_heads * head_dim} inputs, got "
            f"{type(module).__name__} with {inputs}"
        )
    return Projection(layer, name, parent, attribute, module, n_heads, head_dim)


def fingerprint(model: nn.Module, projections: list[Projection]) -> Fingerprint:
    """The model's shape, read off its projections."""
    first = projections[0]
    hidden = getattr(first.module, "out_features", None) or text_config(model).hidden_size
    return Fingerprint(text_config(model).model_type, len(projections), first.n_heads, first.head_dim, hidden)
