"""Bases in fewer bits: what quantizes the linears while a model is loaded, as data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quantizer:
    """A row of QUANTIZERS. package: what must be installed; make: transformers' config for a compute dtype."""

    package: str
    make: Callable[[torch.dtype], object]


def _bitsandbytes(dtype: torch.dtype, **bits):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _torchao_int8(dtype: torch.dtype):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(dtype: torch.dtype):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    # the one form that every device and dtype can be trained through; it keeps a byte for each weight
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


# by name, the first that is installed
QUANTIZERS: dict[str, tuple[Quantizer, ...]] = {
    "int8": (
        Quantizer("bitsandbytes", lambda dtype: _bitsandbytes(dtype, load_in_8bit=True)),
        Quantizer("torchao", _torchao_int8),
    ),
    "int4": (
        Quantizer("bitsandbytes", lambda dtype: _bitsandbytes(dtype, load_in_4bit=True)),
        Quantizer("torchao", _torchao_int4),
    ),
}


def quantizer_of(name: str) -> Quantizer:
    """The row for a name of QUANTIZERS. Raises ValueError for another name, ImportError where nothing is installed."""
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantization {name!r}: expected None or one of {', '.join(QUANTIZERS)}")
    rows = QUANTIZERS[name]
    found = next((row for row in rows if importlib.util.find_spec(row.package) is not None), None)
    if found is None:
        packages = " or ".join(row.package for row in rows)
        raise ImportError(f'quantization {name!r} needs {packages}: pip install "lofit-fast[quantized]"')
    return found
