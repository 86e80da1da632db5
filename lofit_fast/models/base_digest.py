"""What tells two base models apart, and what tells two passes of one: all that their results depend on.

`base_digest` names a model by a sample of its weights, in no time; `identity_of` takes all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers
from torch import Tensor, nn

from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.weight_sample import base_digest, same_base

__all__ = [
    "INCIDENTAL",
    "base_digest",
    "base_modules",
    "dropout_of",
    "identity_of",
    "same_base",
    "settings_of",
    "weights_of",
]

# differ between equal models
INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures")
# of a config, what is about outputs beside the logits, about labels, and about weights that are not loaded
_BESIDE = (
    *("output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type"),
    "initializer_range",
)


def identity_of(model: nn.Module, decoder: nn.Module) -> dict[str, object]:
    """Plain data over what the hidden states of a decoder depend on: weights, code, settings.

    The same with vectors in the projections and without.
    """
    config = text_config(model)
    modules = list(base_modules(decoder))
    return {
        "versions": [torch.__version__, transformers.__version__],
        "attention": getattr(config, "_attn_implementation", None),
        "config": {name: value for name, value in config.to_dict().items() if name not in INCIDENTAL},
        "modules": [f"{type(module).__module__}.{type(module).__name__}({module.extra_repr()})" for module in modules],
        "weights": weights_of(modules),
    }


def settings_of(model: nn.Module) -> dict[str, object]:
    """The config's entries that decide what a model computes from its weights, rotary angles say, as JSON has them.

    Ids of special tokens are left out: a training sets them as the tokenizer has them.
    """
    entries = text_config(model).to_dict().items()
    asked = {name: value for name, value in entries if name not in (*INCIDENTAL, *_BESIDE)}
    plain = {name: value for name, value in asked.items() if not name.endswith("_token_id") and _is_json(value)}
    return {name: json.loads(json.dumps(value)) for name, value in plain.items()}


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def base_modules(decoder: nn.Module) -> Iterator[nn.Module]:
    """A decoder's modules but for the wrappers that hold vectors; what they wrap is among them."""
    return (module for module in decoder.modules() if not isinstance(module, LofitLinear))


def weights_of(modules: Iterable[nn.Module]) -> list[str]:
    """SHA-256 of every parameter and buffer that the modules have themselves, all of its bytes."""
    tensors = [t for m in modules for of in (m.parameters, m.buffers) for t in of(recurse=False)]

    def one(tensor: Tensor) -> str:
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw.data).hexdigest()}"

    # hashing leaves the interpreter's lock
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return list(pool.map(one, tensors))


def dropout_of(module: nn.Module) -> str | None:
    """Why two passes through a module differ in training mode; None where it drops nothing."""
    kind = type(module).__name__
    # routers of experts draw too
    rate = ("p", "dropout") if "Dropout" in kind else ("dropout", "jitter_noise", "jitter_eps")
    floats = {name: x for name, x in vars(module).items() if isinstance(x, float) and x > 0}
    positive = [f"{name}={x}" for name, x in floats.items() if name.endswith(rate)]
    return f"{kind} has {positive[0]}, so no two passes are the same" if positive else None
