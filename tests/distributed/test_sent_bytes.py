"""What data-parallel training sends: the vectors' gradients and a few scalars, once a step, and nothing of the base."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.proof.distributed_bytes import Sent, full_step, lofit_steps
from lofit_fast.config import Recipe
from lofit_fast.tasks import Example
from tests.several_processes import in_processes
from tests.tiny_models import HEAD_DIM, HEADS, LAYERS, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.distributed
EXAMPLES = [Example(f"{a}=", a * 2) for a in "abcdefgh"]


@pytest.mark.slow
def test_a_step_sends_vectors_and_scalars():
    model = tiny_model("llama")

    def work(rank):
        recipe = Recipe(select_epochs=1, tune_epochs=1, batch_size=4, top=3)
        steps = lofit_steps(model, tiny_tokenizer(), EXAMPLES, recipe)
        return steps, full_step(model, torch.arange(7)[None] + 3)

    (steps, full), other = in_processes(2, work)
    assert (steps, full) == other
    scales, offsets = LAYERS * HEADS * HEAD_DIM, 3 * HEAD_DIM
    assert [step["trained"] for step in steps] == [scales] * 2 + [offsets] * 2
    for step in steps:
        # float32; a loss, a total and a norm beside them, and what says that the loss is finite
        assert 4 * step["trained"] <= step["bytes"] <= 4 * step["trained"] + 64
        assert step["calls"] <= 2
    assert full["trained"] == sum(p.numel() for p in model.parameters())
    assert full["bytes"] >= 4 * full["trained"] > 40 * steps[0]["bytes"]


def test_every_collective_is_counted():
    def work(rank):
        ones, two = torch.ones(3), [torch.zeros(5) for _ in "ab"]
        with Sent() as sent:
            dist.all_reduce(ones)
            dist.all_gather(two, torch.ones(5))
            dist.broadcast(ones, 0)
        return sent.calls

    assert in_processes(2, work)[0] == [("allreduce", 12), ("allgather", 20), ("broadcast", 12)]
