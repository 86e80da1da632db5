"""Tensor-parallel models of several families, over two and three processes."""

import pytest
import torch

import lofit_fast as lf
from tests.oracle import randomize
from tests.parallel_models import everything, farthest, parallel, written
from tests.several_processes import in_processes
from tests.tiny_models import tokens

pytest.importorskip("torch.distributed.tensor.parallel", reason="torch without torch.distributed")
pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers without tp_plan")
pytestmark = pytest.mark.slow

# six heads, which two processes can share, and three
SHARED = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48, "head_dim": 8}
GROUPED = {**SHARED, "num_key_value_heads": 3}
FAMILIES = {
    "llama": (3, GROUPED),
    "llama with biases": (2, {**SHARED, "attention_bias": True}),
    "gemma": (2, SHARED),
    "gemma2": (3, SHARED),
    "gemma3_text": (2, SHARED),
    "qwen2": (3, GROUPED),
    "qwen3": (2, SHARED),
    "mistral": (2, SHARED),
    "granite": (2, SHARED),
    # queries, keys and values of one product: the heads are put together again before the projection
    "phi3": (3, SHARED),
    # the same, and the heads stay apart
    "gpt_neox": (2, SHARED),
    "phi": (2, SHARED),
    # its norms see all heads
    "olmo2": (3, SHARED),
}
# more processes than there are heads with keys, or than divide the heads: only whole inputs can be shared
UNEVEN = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 40, "head_dim": 8}
BOTH = lf.LofitConfig(scale=[(0, 0), (0, 4), (1, 1)], offset=[(0, 1), (1, 0), (1, 3), (1, 4)])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_as_in_one_process(name, tmp_path):
    n, changes = FAMILIES[name]
    kind = written(tmp_path, name.split()[0], **changes)
    expected = everything(kind.from_pretrained(tmp_path).eval(), BOTH)
    for found in in_processes(n, lambda rank: everything(parallel(tmp_path, kind, n), BOTH)):
        assert farthest(found, expected) < 1e-5


def test_all_heads_have_scales(tmp_path):
    kind, config = written(tmp_path, "llama", **GROUPED), lf.LofitConfig(scale="all")
    expected = everything(kind.from_pretrained(tmp_path).eval(), config)
    for found in in_processes(3, lambda rank: everything(parallel(tmp_path, kind, 3), config)):
        assert farthest(found, expected) < 1e-5


def test_heads_that_processes_share_unevenly(tmp_path):
    kind = written(tmp_path, "phi3", **UNEVEN)
    expected = everything(kind.from_pretrained(tmp_path).eval(), BOTH)
    for found in in_processes(3, lambda rank: everything(parallel(tmp_path, kind, 3), BOTH)):
        assert farthest(found, expected) < 1e-5


def one_step(model, how):
    """(loss, gradients) in some way of running a model."""
    options = {"positions": "answer"} if how == "answers" else {}
    handle = lf.patch(model, lf.LofitConfig(scale=BOTH.scale, offset=BOTH.offset, **options))
    randomize(handle)
    if how == "checkpoints":
        model.gradient_checkpointing_enable()
    if how == "scales frozen":
        for (component, _), vectors in handle.vectors().items():
            vectors.requires_grad_(component == "offset")
    ids = tokens()
    labels = ids.clone()
    labels[:, :5] = -100
    loss = model.train()(ids, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(vectors.grad for vectors in handle.parameters() if vectors.grad is not None)]


@pytest.mark.parametrize("how", ["answers", "checkpoints", "scales frozen"])
def test_other_ways_to_run(how, tmp_path):
    kind = written(tmp_path, "llama", **GROUPED)
    expected = one_step(kind.from_pretrained(tmp_path), how)
    for found in in_processes(2 + 1, lambda rank: one_step(parallel(tmp_path, kind, 3), how)):
        assert len(found) == len(expected)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.real
def test_a_real_model_trains_as_in_one_process():
    """SmolLM2 has nine heads, three with keys and values."""
    import transformers

    from lofit_fast.models.load import load_model

    model, _ = load_model("smollm2", dtype="float32", device="cpu")
    folder, kind = model.config._name_or_path, transformers.LlamaForCausalLM
    config = lf.LofitConfig(scale=[(0, 2), (12, 8), (29, 0)], offset=[(0, 1), (12, 0), (12, 5), (29, 8)])
    expected = everything(model, config)
    for found in in_processes(3, lambda rank: everything(parallel(folder, kind, 3), config), limit=280):
        # logits of 20 and more, of which the base's own differ as much
        assert farthest(found, expected) < 1e-3
        for a, b in zip(found["final"], expected["final"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        for a, b in zip(found["loss"], expected["loss"], strict=True):
            assert abs(a - b) < 1e-5
