"""The tensors of a GGUF file of llama.cpp's architecture `llama`, under their names and in the layout of transformers.

llama.cpp rotates neighbours where transformers rotates halves: rows of queries and keys are in another order.

    row 2 i + j of a head there   =   row j D/2 + i here          i < D/2, j in {0, 1}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURE = "llama"
# the file's name -> what the config calls it
_SHAPE = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
# derived from the config, of which no tensor of transformers is made
_ROPE_FACTORS = "rope_freqs.weight"
# what gguf's arrays of a type consist of, and how many of these a number takes
_UNITS = {"F32": (torch.float32, 1), "F16": (torch.float16, 1), "BF16": (torch.uint8, 2)}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class LlamaGguf:
    """A GGUF file that is read tensor by tensor.

    path: the file. reader: gguf's. architecture: "llama", whatever else is refused.
    Raises FileNotFoundError for a file that is not there, ValueError for no GGUF file, one of several parts, or one of
    another architecture.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        if not path.is_file():
            raise FileNotFoundError(f"no such GGUF file: {path}")
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        # whatever numpy and the reader raise at a file that is cut or damaged
        except Exception as error:
            raise ValueError(f"{path} is no whole GGUF file: {error}") from error
        self.architecture = str(self._entry("general.architecture"))
        if self.architecture != ARCHITECTURE:
            raise ValueError(
                f"{path} is of llama.cpp's architecture {self.architecture!r}: expected {ARCHITECTURE!r}, the one that "
                "is written here"
            )
        if (self._entry("split.count") or 1) > 1:
            raise ValueError(f"{path} is one of several parts: expected a model in one file")

    def check_holds(self, state: Mapping[str, Tensor], config: Any, whose: str) -> None:
        """Raise ValueError unless the file holds a model's tensors and no others, and the numbers of its config.

        state: of a Llama, by transformers' names. Biases of zeros, and a tied head, need not be in the file. Tensors in
        16 bits may be rounded. whose: of what model the state is, for the error.
        """
        self._check_config(config, whose)
        expected = self._names(state, config)
        found = {tensor.name: tensor for tensor in self.reader.tensors}
        for name in found.keys() - expected.keys() - {_ROPE_FACTORS}:
            raise ValueError(f"{self.path} has a {name}, which {whose} lacks")
        for name, key in expected.items():
            want = state[key]
            if name not in found:
                if (name.endswith(".bias") and not want.any()) or (name == "output.weight" and _is_tied(config)):
                    continue
                raise ValueError(f"{self.path} lacks {name}, which {whose} has")
            if not self._is_equal(found[name], want, self._heads(name, config)):
                raise ValueError(
                    f"{self.path} is not {whose}: its {name} holds other numbers. Load the base from this very file, "
                    "or give the file that it was loaded from"
                )

    def as_type(self, tensor: Any, kind: str | None, only_info: bool = False) -> tuple[Any, Any]:
        """(array, type) of a tensor of the file to be written: a matrix in another type, a vector in float32.

        kind: "F32", "F16" or "BF16"; None for what it is. only_info: an array of that shape whose numbers do not count.
        """
        import gguf

        if kind is None or (tensor.tensor_type.name == kind):
            return tensor.data, tensor.tensor_type
        number = gguf.GGMLQuantizationType["F32" if len(tensor.shape) == 1 else kind]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if only_info:
            unit, per_number = _UNITS[number.name]
            return torch.zeros((), dtype=unit).expand(*shape[:-1], shape[-1] * per_number).numpy(), number
        return gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape), number), number

    def _names(self, state: Mapping[str, Tensor], config: Any) -> dict[str, str]:
        """The file's name -> transformers' of a Llama's tensors."""
        import gguf

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        found = {}
        for key in state:
            module, kind = key.rsplit(".", 1)
            name = names.get_name(module)
            if name is None:
                raise ValueError(f"llama.cpp's Llama has no {key}")
            found[f"{name}.{kind}"] = key
        return found

    def _heads(self, name: str, config: Any) -> int | None:
        """Into how many heads the rows of a tensor that is rotated are divided; None for one that is not."""
        part = name.split(".")[-2]
        return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)

    def _is_equal(self, tensor: Any, want: Tensor, heads: int | None) -> bool:
        import gguf

        got = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).float()
        if got.numel() != want.numel():
            return False
        got, want = got.reshape(want.shape), want.detach().cpu()
        if heads is not None:
            got = halved(got, heads)
        kind = _FLOATS.get(tensor.tensor_type.name)
        # the model may be in 16 bits, or the file
        return torch.equal(got.to(want.dtype), want) or (kind is not None and torch.equal(got, want.to(kind).float()))

    def _check_config(self, config: Any, whose: str) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        expected = {entry: getattr(config, name) for entry, name in (_SHAPE | _NUMBERS).items()}
        expected |= {"rope.dimension_count": head_dim, "rope.freq_base": rope.get("rope_theta")}
        for entry, want in expected.items():
            got = self._entry(f"{ARCHITECTURE}.{entry}")
            # the file may leave out what follows from the rest
            if got is not None and want is not None and not math.isclose(got, want, rel_tol=1e-6):
                raise ValueError(f"{self.path} is not {whose}: its {entry} is {got}, and there {want}")
        factors = next((t for t in self.reader.tensors if t.name == _ROPE_FACTORS), None)
        scaled = rope.get("rope_type", "default")
        if (factors is not None and not (factors.data == 1).all()) != (scaled == "llama3"):
            raise ValueError(f"{self.path} is not {whose}: only one of them scales its positions as Llama 3 does")
        kind = self._entry(f"{ARCHITECTURE}.rope.scaling.type") or "none"
        if (kind if kind != "none" else "default") != (scaled if scaled != "llama3" else "default"):
            raise ValueError(f"{self.path} is not {whose}: it scales positions by {kind!r}, and there by {scaled!r}")

    def _entry(self, name: str) -> Any:
        field = self.reader.get_field(name)
        return None if field is None else field.contents()


def halved(rows: Tensor, heads: int) -> Tensor:
    """Rows (H D, ...) of queries or keys in transformers' order, from llama.cpp's."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _is_tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))
