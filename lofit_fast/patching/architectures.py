"""The output projections of a model: found by the rows of `families.py`, each checked to take heads x head_dim inputs.

Nothing here imports transformers: a model is a tree of named modules with a `config`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product

from torch import nn

from lofit_fast.patching.bypass import bypasses
from lofit_fast.patching.families import ARCHITECTURES, BYPASSES, GENERIC, REFUSED, Architecture

# what modules and configs call the number of heads, and the width of one head's output
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_query_heads", "decoder_attention_heads")
_WIDTHS = ("v_head_dim", "head_dim", "head_size", "dim_head", "attention_head_size", "key_value_proj_dim", "d_kv")
_HIDDEN = ("hidden_size", "embed_dim", "d_model", "n_embd")
# what a linear calls its number of inputs, and of outputs; quantized ones have names of their own
_INPUTS = ("in_features", "infeatures", "nx")
_OUTPUTS = ("out_features", "outfeatures", "nf")


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
    """The shape of a base model, as far as an adapter depends on it.

    layers: those with a projection. heads, head_dim, hidden: one number where all of these layers have the same, else
    one per layer.
    """

    model_type: str
    layers: int
    heads: int | tuple[int, ...]
    head_dim: int | tuple[int, ...]
    hidden: int | tuple[int, ...]

    def __post_init__(self) -> None:
        # JSON knows lists alone
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))

    def as_dict(self) -> dict[str, str | int | tuple[int, ...]]:
        """Plain data, for the adapter's config."""
        return asdict(self)


def architecture_of(model: nn.Module) -> Architecture:
    """The row of the model's family, or the generic one."""
    return ARCHITECTURES.get(text_config(model).model_type, GENERIC)


def text_config(model: nn.Module):
    """The config that describes the decoder: the model's own, or its text part. Raises TypeError without one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise TypeError(f"expected a Hugging Face model with a config, got {type(model).__name__}")
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:
        # of a text encoder and a decoder, the decoder's
        return config.get_text_config(decoder=True)


def find_projections(model: nn.Module) -> list[Projection]:
    """Every output projection of the decoder, by ascending layer.

    A layer's number is its place in the decoder's list. Layers without attention (convolutions, state spaces, linear
    attention by other names) have none. Of a model with towers for images and sounds the language model counts; of an
    encoder and a decoder the decoder's self-attention, never the one that looks at the encoder; of an encoder alone its
    self-attention.

    Raises:
        TypeError: something that is no Hugging Face model.
        ValueError: no projection or none of heads x head_dim inputs, naming what was looked for; several decoders; a
            family that is known not to work; a projection that its layer never calls, or that several layers share.
    """
    prefix, layers = _layer_list(model)
    config, paths = text_config(model), architecture_of(model).projections
    found = []
    for number, layer in enumerate(layers):
        path = next((path for path in paths if _has(layer, path)), None)
        if path is not None:
            found.append(_projection(model, config, number, f"{prefix}.{number}.{path}"))
    _check_each_is_its_own(found)
    return found


def _check_each_is_its_own(projections: list[Projection]) -> None:
    """Raise ValueError where two layers hold the same attention: vectors of one would be the other's too."""
    first = {}
    for p in projections:
        other = first.setdefault((id(p.parent), p.attribute), p)
        if other is not p:
            raise ValueError(
                f"{p.name} is the very module of {other.name}: layers that share one attention cannot have vectors "
                "of their own"
            )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """All of the decoder's layers, ascending, those without attention too. Raises as `find_projections` does."""
    return list(_layer_list(model)[1])


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name in the model, list) of the decoder's layers: the one list of which some have an output projection."""
    config, paths = text_config(model), architecture_of(model).projections
    unsupported = f"{type(model).__name__} (model_type {config.model_type!r}) is not supported: "
    if config.model_type in REFUSED:
        raise ValueError(unsupported + REFUSED[config.model_type])
    prefix, decoder = _decoder(model)
    # what the model calls its decoder may be something else
    lists = _lists(prefix, decoder, paths) or _lists("", model, paths)
    # not those of a tower of images or sounds
    found = [(name, layers) for name, layers in lists if _owner(model, name) == config.model_type]
    if not found:
        others = f" and {len(paths) - 1} other places" if len(paths) > 1 else ""
        raise ValueError(
            f"{unsupported}looked for a linear at 'layers.<n>.{paths[0]}'{others} with heads x head_dim inputs and "
            "found none in its language model"
        )
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(
            f"{type(model).__name__} has several decoders ({names}), and does not say which one is its language model: "
            "pass the model that holds one of them, and freeze the rest"
        )
    return found[0]


def _decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """(name in the model, module) of the language model; the model itself where it says nothing."""
    find = getattr(model, "get_decoder", None)
    decoder = model if find is None else find()
    names = {id(module): name for name, module in model.named_modules()}
    return (names[id(decoder)], decoder) if id(decoder) in names else ("", model)


def _owner(model: nn.Module, name: str) -> str:
    """The model_type of the text config of the innermost model that holds a module."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        holder = model.get_submodule(".".join(parts[:end]))
        if isinstance(getattr(getattr(holder, "config", None), "model_type", None), str):
            return text_config(holder).model_type
    return text_config(model).model_type


def _lists(prefix: str, root: nn.Module, paths: tuple[str, ...]) -> list[tuple[str, nn.ModuleList]]:
    """The lists below the root of which some member has a projection at one of the paths."""
    return [
        (name, module)
        for name, module in root.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and any(_has(layer, path) for layer in module for path in paths)
    ]


def _has(layer: nn.Module, path: str) -> bool:
    try:
        return _number(layer.get_submodule(path), _INPUTS) is not None
    except AttributeError:
        return False


def _projection(model: nn.Module, config, layer: int, name: str) -> Projection:
    parent_name, _, attribute = name.rpartition(".")
    parent, module = model.get_submodule(parent_name), model.get_submodule(name)
    if bypasses(parent, attribute, BYPASSES.get(config.model_type)):
        raise ValueError(
            f"{name}: the code of {type(parent).__name__} multiplies by its projection's weight itself, so that a "
            "wrapper around the projection would never be called"
        )
    inputs, shapes = _number(module, _INPUTS), list(_shapes(_of_layers(config, layer), parent, layer))
    fitting = next((shape for shape in shapes if shape[0] * shape[1] == inputs), None)
    if fitting is None:
        n_heads, head_dim = shapes[0] if shapes else ("?", "?")
        expected = f" = {n_heads * head_dim}" if shapes else ""
        raise ValueError(
            f"{name}: expected a linear of {n_heads} heads x {head_dim}{expected} inputs, got {type(module).__name__} "
            f"with {inputs}"
        )
    return Projection(layer, name, parent, attribute, module, *fitting)


def _of_layers(config, layer: int):
    """The config of one layer, where they have configs of their own."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def _shapes(config, parent: nn.Module, layer: int) -> Iterator[tuple[int, int]]:
    """(heads, head_dim) as the attention module or the config have them, the likeliest first."""
    heads, widths, hidden = (
        [n for owner in (parent, config) for name in names if (n := _of_layer(getattr(owner, name, None), layer))]
        for names in (_HEADS, _WIDTHS, _HIDDEN)
    )
    yield from product(heads, widths)
    yield from ((n, size // n) for n, size in product(heads, hidden) if size % n == 0)


def _of_layer(value: object, layer: int) -> int | None:
    """A number that may vary by layer."""
    if isinstance(value, list | tuple):
        value = value[layer] if layer < len(value) else None
    return value if type(value) is int and value > 0 else None


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((n for name in names if type(n := getattr(module, name, None)) is int), None)


def inputs_of(module: nn.Module) -> int:
    """K, the number of inputs of a linear, whatever it calls it."""
    return _number(module, _INPUTS)


def outputs_of(module: nn.Module) -> int:
    """N, the number of outputs of a linear, whatever it calls it. Raises AttributeError where it says nothing."""
    if (number := _number(module, _OUTPUTS)) is None:
        raise AttributeError(f"{type(module).__name__} has none of {', '.join(_OUTPUTS)}")
    return number


def fingerprint(model: nn.Module, projections: list[Projection]) -> Fingerprint:
    """The model's shape, read off its projections."""
    shapes = [(p.n_heads, p.head_dim, outputs_of(p.module)) for p in projections]
    sizes = (column[0] if len(set(column)) == 1 else column for column in zip(*shapes, strict=True))
    return Fingerprint(text_config(model).model_type, len(projections), *sizes)
