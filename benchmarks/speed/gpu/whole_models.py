"""Models of real shapes with random weights, built in code: no file and no network, and a toy of each for a CPU."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.speed.step.workload import BATCH, Workload
from lofit_fast.data.encode import IGNORED

# of a device's memory, what weights and activations may be planned to take
_SHARE = 0.85
# bytes per weight: 16 bits, and float32 while the exact losses are computed
_PER_WEIGHT = 2 + 4
# shortest and longest example, labelled tokens at its end: on a GPU, and in a rehearsal
LENGTHS = {"cuda": (256, 768, 2), "cpu": (9, 24, 2)}
# standard deviation of logits: large enough that a loss depends on the vectors, in 16 bits too
_LOGITS_STD = 2.0
# batches that examples are drawn from
_POOL = 8
_TOY = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class WholeModel:
    """A row of MODELS: `model_type` as transformers calls it, and its published configuration.

    toy: what else a rehearsal changes.
    """

    model_type: str
    config: dict[str, Any]
    toy: dict[str, Any]

    def config_for(self, device: str) -> dict[str, Any]:
        """The arguments of its config class: the published ones, or the toy's on a CPU."""
        config = self.config if device == "cuda" else {**self.config, **_TOY, **self.toy}
        return {**config, "initializer_range": _LOGITS_STD / config["hidden_size"] ** 0.5}


MODELS: dict[str, WholeModel] = {
    "Llama-3-8B": WholeModel(
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "pad_token_id": 0,
        },
        {},
    ),
    "Gemma-2-9B": WholeModel(
        "gemma2",
        {
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
        },
        {"query_pre_attn_scalar": 16},
    ),
}


def built(name: str, device: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A row of MODELS with random weights on a device, frozen. layers: fewer than it has, None for all."""
    from transformers import AutoConfig, AutoModelForCausalLM

    row = MODELS[name]
    arguments = row.config_for(device) | ({} if layers is None else {"num_hidden_layers": layers})
    config = AutoConfig.for_model(row.model_type, **arguments)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).requires_grad_(False)


def n_layers(name: str, device: str) -> int:
    """How many layers a row of MODELS has, on a CPU its toy."""
    return MODELS[name].config_for(device)["num_hidden_layers"]


def layers_that_fit(name: str, device: str, free: int | None) -> int:
    """How many of the model's layers are planned for `free` bytes, at least one; None for as many as there are.

    Counted: the weights in 16 bits and once more in float32, what a layer keeps of each token of the longest batch
    for its backward pass, and full logits. A plan: who runs out of memory all the same halves it.
    """
    config = MODELS[name].config_for(device)
    every = config["num_hidden_layers"]
    if free is None:
        return every
    N, inner = config["hidden_size"], config["intermediate_size"]
    H, kv, D = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    tokens = BATCH * LENGTHS[device][1]
    of_a_layer = _PER_WEIGHT * N * (2 * H * D + 2 * kv * D + 3 * inner) + 2 * tokens * (8 * N + 4 * inner + 2 * H * D)
    # embeddings in and out, and logits in 16 bits, float32, and their gradient
    beside = config["vocab_size"] * (2 * _PER_WEIGHT * N + 10 * tokens)
    return max(1, min(every, int((_SHARE * free - beside) // of_a_layer)))


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules that has the very same weights: a peer in it leaves the others alone, and costs no copy."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def random_examples(name: str, device: str, seed: int = 0) -> Workload:
    """Examples of random tokens and lengths, labelled at their ends as completions of a word or two are."""
    shortest, longest, labelled = LENGTHS[device]
    size = MODELS[name].config_for(device)["vocab_size"]
    draw, rows = random.Random(seed), []
    for _ in range(_POOL * BATCH):
        ids = [draw.randrange(1, size) for _ in range(draw.randint(shortest, longest))]
        rows.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - labelled) + ids[-labelled:]})
    return Workload(rows, 0, f"random tokens, {shortest} to {longest} an example, the last {labelled} labelled")
