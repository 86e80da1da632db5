"""LoRA, by PEFT, without its wrapper around the model."""

import pytest
import torch

from benchmarks.peers import lora
from tests.benchmarks.peers.edited import logits, shake
from tests.tiny_models import HEAD_DIM, HEADS, HIDDEN, LAYERS, tiny_model

pytest.importorskip("peft")


def test_lora_is_its_equation():
    model, plain = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    attachment = lora.make(model, rank=3, alpha=7)
    shake(attachment)
    with torch.no_grad():
        for adapted, layer in zip(model.model.layers, plain.model.layers, strict=True):
            for name in ("q_proj", "v_proj"):
                linear = getattr(adapted.self_attn, name)
                update = linear.lora_B["default"].weight @ linear.lora_A["default"].weight
                getattr(layer.self_attn, name).weight.add_(7 / 3 * update)
    assert (logits(model) - logits(plain)).abs().max() <= 1e-12
    assert (logits(model) - logits(tiny_model("llama", torch.float64))).abs().max() > 1e-3


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_lora_counts_its_matrices(llama, targets):
    query, value, ffn = HEADS * HEAD_DIM, 2 * HEAD_DIM, 48
    sizes = [HIDDEN + query, HIDDEN + value]
    if targets == "all-linear":
        sizes += [HIDDEN + value, query + HIDDEN] + 3 * [HIDDEN + ffn]
    assert lora.make(llama, targets=targets).n_parameters() == 8 * sum(sizes) * LAYERS


def test_lora_trains_in_float32_on_a_16_bit_model():
    attachment = lora.make(tiny_model("llama", torch.bfloat16))
    assert {parameter.dtype for parameter in attachment.parameters()} == {torch.float32}


def test_lora_draws_from_its_seed_alone():
    drawn = []
    for before in (0, 1):
        model = tiny_model("llama")
        torch.manual_seed(before)
        state = torch.get_rng_state()
        attachment = lora.make(model, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(torch.cat([parameter.detach().flatten() for parameter in attachment.parameters()]))
    assert torch.equal(*drawn)


def test_lora_is_as_strong_at_every_rank():
    made = [lora.make(tiny_model("llama"), rank=rank).model for rank in (1, 8)]
    assert {model.model.layers[0].self_attn.q_proj.scaling["default"] for model in made} == {2.0}


def test_lora_adapts_the_layers_it_is_given(llama):
    whole = lora.make(tiny_model("llama")).n_parameters()
    attachment = lora.make(llama, layers=[2])
    assert attachment.n_parameters() * LAYERS == whole
    adapted = {name for name, module in llama.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"model.layers.2.self_attn.{name}" for name in ("q_proj", "v_proj")}
