"""Linears that are no plain nn.Linear, as quantizers leave them: stand-ins of every shape, and real ones where installed.

A stand-in rounds a weight and keeps it under the names that a format has; its forward makes the weight again.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from tests.tiny_models import tiny_model


class _Packed(nn.Module):
    """Four bits a weight, two weights a byte, each column's scale: buffers alone, no weight, no bias."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        scales = weight.abs().amax(0) / 7
        levels = (weight / scales).round().to(torch.int8).add(8).to(torch.uint8)
        self.register_buffer("qweight", levels[:, ::2] << 4 | levels[:, 1::2])
        self.register_buffer("qzeros", torch.full((1,), 8, dtype=torch.int32))
        self.register_buffer("scales", scales)

    def made(self) -> Tensor:
        levels = torch.stack([self.qweight >> 4, self.qweight & 15], dim=2).flatten(1)
        return (levels - self.qzeros) * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.made().to(x.dtype))


class GptqLike(_Packed):
    """What older packages call the sizes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.infeatures, self.outfeatures = base.in_features, base.out_features


class AwqLike(_Packed):
    """A bias that is there and None."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, None


class AttributesOnly(AwqLike):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        for name, tensor in list(self._buffers.items()):
            del self._buffers[name]
            setattr(self, name, tensor)


class HqqLike(nn.Module):
    """Whole numbers as a parameter, and the rest in a dict."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.W_q = nn.Parameter((base.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.meta = {"scale": scale}

    def forward(self, x: Tensor) -> Tensor:
        return product(x, (self.W_q * self.meta["scale"]).to(x.dtype))


class Float8Linear(nn.Linear):
    """A floating weight that no product can be computed from, and its scale."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        scale = base.weight.detach().abs().amax() / 448
        self.weight = nn.Parameter((base.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.to(x.dtype) * self.weight_scale_inv.to(x.dtype))


def stripped(base: nn.Linear) -> nn.Linear:
    """Exactly an nn.Linear, without its weight: packed parameters and a forward of its own, as compressed-tensors'."""
    packed = AwqLike(base)
    del base.weight, base.bias
    base.weight_packed, base.weight_scale = nn.Parameter(packed.qweight, requires_grad=False), packed.scales
    base.forward = lambda x: packed(x)
    return base


def cuts_gradients(base: nn.Linear) -> nn.Module:
    """One whose kernel is made for inference."""

    class ForInference(AwqLike):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    return ForInference(base)


def _bitsandbytes(make: Callable) -> Callable[[nn.Linear], nn.Module]:
    def packed(base: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        new = make(bnb.nn, base.in_features, base.out_features)
        new.load_state_dict({"weight": base.weight.detach().float()})
        return new.requires_grad_(False).to("cpu")

    return packed


def _torchao(name: str, **options) -> Callable[[nn.Linear], nn.Module]:
    def packed(base: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        holder = nn.Sequential(base.requires_grad_(False))
        quantization.quantize_(holder, getattr(quantization, name)(**options))
        return holder[0]

    return packed


STAND_INS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "gptq-like": GptqLike,
    "awq-like": AwqLike,
    "attributes-only": AttributesOnly,
    "hqq-like": HqqLike,
    "float8-linear": Float8Linear,
    "stripped": stripped,
}
KINDS = STAND_INS | {
    "bitsandbytes-4": _bitsandbytes(
        lambda nn, k, n: nn.Linear4bit(k, n, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    ),
    "bitsandbytes-8": _bitsandbytes(lambda nn, k, n: nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)),
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-int4": _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao-float8": _torchao("Float8WeightOnlyConfig"),
}


def packed_model(pack: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0):
    """A tiny Llama of which every linear in a layer is packed, flagged as transformers flags a quantized model."""
    model = tiny_model("llama", dtype, seed=seed)
    for parent in list(model.model.layers.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear:
                setattr(parent, name, pack(module))
    model.is_quantized = True
    return model
