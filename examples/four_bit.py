"""LoFiT on a base in 4 bits: load, patch, fit a few steps, and count the bytes against a float32 base.

    python -m examples.four_bit --model FOLDER_OR_HUB_ID

Without --model a tiny random Llama is made. bitsandbytes quantizes where it is installed, torchao otherwise.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import lofit_fast as lf
from lofit_fast.models.quantization import quantizer_of

EXAMPLES = [
    {"prompt": f"{a} is followed by", "completion": f" {b}"} for a, b in zip("abcdefgh", "bcdefghi", strict=True)
]


def weight_bytes(model: nn.Module) -> int:
    """What a model's parameters and buffers take, packed ones as they are stored."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # what bitsandbytes keeps beside its packed weights
    states = (getattr(tensor, "quant_state", None) for tensor in list(tensors.values()))
    beside = (value for state in states if state is not None for value in state.as_dict(packed=True).values())
    tensors |= {id(value): value for value in beside}
    return sum(map(_stored, tensors.values()))


def _stored(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def plain_config(config):
    """A quantized model's config without the word of it."""
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


def peak_bytes() -> int:
    """The most memory so far: of the GPU where there is one, of the process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tiny_folder(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer of characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = {token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(characters), num_key_value_heads=2, max_position_embeddings=128, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(model_name: str, output: Path, epochs: int = 2) -> dict[str, object]:
    """Fit a model loaded in 4 bits; what it took, and what the same weights take in float32."""
    model, tokenizer = lf.load_model(model_name, quantization="int4", dtype="float32")
    # made without its numbers: loaded, it would be the peak
    with torch.device("meta"):
        in_float32 = weight_bytes(type(model)(plain_config(model.config)).float())
    recipe = lf.Recipe(top=2, select_epochs=epochs, tune_epochs=epochs, batch_size=4)
    result = lf.fit(model, tokenizer, EXAMPLES, recipe, output_dir=output, progress=False)
    in_four_bits = weight_bytes(model) - 4 * result.handle.n_parameters()
    return {
        "quantized by": quantizer_of("int4").package,
        "trained numbers": result.handle.n_parameters(),
        "losses": [round(row["loss"], 4) for row in result.history],
        "weights in 4 bits, bytes": in_four_bits,
        "weights in float32, bytes": in_float32,
        "ratio": round(in_float32 / in_four_bits, 2),
        "peak memory, bytes": peak_bytes(),
    }


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """The command line: prints the report as JSON, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a hub id; default: a tiny random Llama")
    parser.add_argument("--output", type=Path, help="the run folder; default: a temporary one")
    parser.add_argument("--epochs", type=int, default=2, help="of each step")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        name = options.model or str(tiny_folder(Path(scratch) / "model"))
        report = run(name, options.output or Path(scratch) / "run", options.epochs)
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
