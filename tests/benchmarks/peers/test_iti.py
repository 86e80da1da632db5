"""ITI: its directions against plain formulas, and its offsets merged against the same vectors in hooks."""

import pytest
import torch

from benchmarks.peers import iti
from tests.accuracy_rule import check
from tests.benchmarks.peers.edited import CONTRASTS, logits
from tests.oracle import Hook, vectors_of
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer


def test_iti_shifts_by_the_deviation_along_the_mean_shift():
    draw = torch.Generator().manual_seed(3)
    z = torch.randn(10, 2, 3, 4, generator=draw)
    labels = torch.tensor([True, False] * 5)
    got = iti.shifts(z, labels)
    for layer in range(2):
        for head in range(3):
            at = z[:, layer, head].double()
            towards = at[labels].mean(0) - at[~labels].mean(0)
            unit = towards / towards.norm()
            expected = unit * (at @ unit).var(correction=0).sqrt()
            assert (got[layer, head] - expected).abs().max() <= 1e-6


def test_iti_probe_directions_tell_right_from_wrong():
    draw = torch.Generator().manual_seed(3)
    labels = torch.tensor([True, False] * 50)
    z = (
        torch.randn(100, 1, 2, 8, generator=draw)
        + torch.where(labels, 1.0, -1.0)[:, None, None, None] * torch.eye(8)[2]
    )
    z[:, 0, 1] = float("nan")
    got = iti.shifts(z, labels, "probe")
    assert got[0, 0].argmax() == 2 and got[0, 0, 2] > 0.8 * got[0, 0].norm()
    assert got[0, 1].isnan().all()
    with pytest.raises(ValueError, match="mean_shift"):
        iti.shifts(z, labels, "up")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_iti_merged_equals_its_hook_form(dtype):
    model = tiny_model("llama", dtype)
    handle = iti.make(model, tiny_tokenizer(), CONTRASTS, top=5, alpha=15.0)
    vectors = vectors_of(handle)
    base = logits(tiny_model("llama", torch.float64))
    hooked = {}
    for name, at in (("exact", torch.float64), ("eager", dtype)):
        plain = tiny_model("llama", dtype).to(at)
        Hook(plain, vectors, at)
        hooked[name] = logits(plain)
    merged = logits(handle.merge())
    assert (hooked["exact"] - base).abs().max() > 0.1
    check(merged, hooked["exact"], hooked["eager"])


def test_iti_takes_the_best_probed_heads_and_scales_by_alpha(llama):
    directions = iti.find_directions(llama, tiny_tokenizer(), CONTRASTS)
    best = directions.accuracy.flatten().topk(3).values.min()
    handle = iti.steer(llama, directions, top=3, alpha=2.0)
    assert handle.n_parameters() == 3 * HEAD_DIM
    assert all(directions.accuracy[layer, head] >= best for layer, head in handle.config.offset)
    for number, layer in handle.layers.items():
        assert torch.equal(layer.offset, 2 * directions.shifts[number, layer.heads("offset")])
    handle.unpatch()
    assert iti.steer(llama, directions, top=0.5, alpha=2.0).n_parameters() == LAYERS * HEADS // 2 * HEAD_DIM
