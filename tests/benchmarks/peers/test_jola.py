"""JoLA: gated scales and offsets on every head."""

import math

import torch

from benchmarks.peers import jola
from tests.benchmarks.peers.edited import logits, shake
from tests.oracle import Hook
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model


def test_jola_is_its_equation():
    model, plain = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    attachment = jola.make(model)
    shake(attachment, 0.5)
    vectors = {}
    for number, layer in enumerate(model.model.layers):
        edit = layer.self_attn.o_proj.peer
        for component in ("scale", "offset"):
            gate = (torch.sigmoid(getattr(edit, f"{component}_gate")) * 1.2 - 0.1).clamp(0, 1)
            vectors[number, component] = (list(range(HEADS)), gate[:, None] * getattr(edit, component))
    Hook(plain, vectors, torch.float64)
    assert (logits(model) - logits(plain)).abs().max() <= 1e-12
    assert (logits(model) - logits(tiny_model("llama", torch.float64))).abs().max() > 1e-3


def test_jola_samples_gates_while_training_only(llama):
    shake(jola.make(llama))
    assert torch.equal(logits(llama), logits(llama))
    llama.train()
    assert not torch.equal(logits(llama), logits(llama))


def test_jola_gates_are_hard_concrete():
    log_odds = torch.full((200_000,), 0.3)
    sampled = jola.gate(log_odds, True)
    # P(gate > 0) of arXiv:1712.01312, equation 12, and P(gate < 1) by the same argument
    opens = 1 / (1 + math.exp(-(0.3 - 0.33 * math.log(0.1 / 1.1))))
    below_one = 1 / (1 + math.exp(0.3 - 0.33 * math.log(1.1 / 0.1)))
    assert abs((sampled > 0).float().mean() - opens) < 5e-3
    assert abs((sampled < 1).float().mean() - below_one) < 5e-3
    assert jola.gate(torch.tensor([-9.0, 9.0]), False).tolist() == [0, 1]


def test_jola_penalty_is_the_expected_number_of_open_gates(llama):
    attachment = jola.make(llama, gate_weight=0.5)
    opens = 1 / (1 + math.exp(0.33 * math.log(0.1 / 1.1)))
    assert math.isclose(attachment.penalty().item(), 0.5 * 2 * HEADS * LAYERS * opens, rel_tol=1e-5)
    shake(attachment)
    attachment.penalty().backward()
    assert all((edit.scale_gate.grad > 0).all() for _, edit in attachment.hosts)


def test_jola_counts_vectors_and_gates(llama):
    assert jola.make(llama).n_parameters() == LAYERS * HEADS * (2 * HEAD_DIM + 2)
