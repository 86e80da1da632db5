"""Evaluation divided among processes: the answers, scores and metrics that one process has, bit for bit."""

import warnings

import pytest
import torch
import torch.distributed as dist

import lofit_fast as lf
from lofit_fast import ranks, roll_call
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.division import Division
from lofit_fast.evaluation.judge import generate_answers, judge
from lofit_fast.evaluation.logprobs import log_probs
from lofit_fast.evaluation.shared_prompts import SharedPrompts
from lofit_fast.models.trials import remembering
from lofit_fast.tasks import Example, Task
from lofit_fast.tasks.task import MultipleChoice
from tests.oracle import randomize
from tests.several_processes import in_processes
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.distributed
TOKENIZER = tiny_tokenizer()
PROMPTS = ["abcdef", "q", "The quick brown fox jumps!", "x=1; y=2;", "zz"]
CHOICES = [["yes", "no"], ["y", "no", "perhaps"], ["a", "b"], ["b", "bb"], ["no", "yes"]]
ROWS = [{"input_ids": list(range(3, n)), "labels": [-100] * 2 + list(range(5, n))} for n in (9, 6, 12, 20, 7)]


def patched(family="llama", **changes):
    """Weights large enough that answers depend on the prompt, and offsets on every head."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0 if "embed" not in name else 2.0)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    randomize(handle)
    return model


def everything(model, prompts=PROMPTS, choices=CHOICES):
    """What a model says and thinks of everything, as plain numbers and texts."""
    pairs = list(zip(prompts, choices, strict=True))
    task = Task("letters", [], [Example(prompt, of_it[0]) for prompt, of_it in pairs])
    best = tuple(MultipleChoice(prompt, tuple(of_it), (0,), 0) for prompt, of_it in pairs)
    chosen = Task("choices", [], [], choices=best)
    texts = generate_answers(model, TOKENIZER, prompts, max_new_tokens=4, batch_size=2)
    scores = [row.tolist() for row in score_choices(model, TOKENIZER, prompts, choices, max_tokens=24)]
    by_task = (judge(model, TOKENIZER, task, batch_size=2), judge(model, TOKENIZER, chosen))
    judged = [(j.metrics, j.hits) for j in by_task]
    return texts, scores, judged, log_probs(model, ROWS, 0, batch_size=2)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_several_find_one_finds(processes):
    model = patched()
    assert in_processes(processes, lambda rank: everything(model)) == [everything(model)] * processes


@pytest.mark.slow
def test_fewer_rows_than_processes():
    model, few = patched(), (PROMPTS[:1], CHOICES[:1])
    assert in_processes(3, lambda rank: everything(model, *few)) == [everything(model, *few)] * 3


def test_every_process_computes_a_part_of_it():
    model = patched()

    def work(rank):
        seen = []
        # what is tried of the model is tried once, in every process
        with remembering():
            generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=1, batch_size=2)
            model.register_forward_pre_hook(lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True)
            generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=1, batch_size=2)
        return seen

    # batches of 2, 2 and 1
    assert in_processes(2, work) == [[2, 1], [2]]


@pytest.mark.slow
def test_one_choice_at_a_time_is_divided_too():
    model = patched()

    def work(rank):
        # what no row of several sequences takes
        model.config.use_bidirectional_attention = True
        seen = []
        model.register_forward_hook(lambda *_: seen.append(1))
        scores = score_choices(model, TOKENIZER, PROMPTS, CHOICES)
        return [row.tolist() for row in scores], len(seen)

    (alone, all_of_it), *_ = in_processes(1, work)
    found = in_processes(2, work)
    assert [scores for scores, _ in found] == [alone] * 2
    assert all_of_it == sum(map(len, CHOICES)) == sum(n for _, n in found) and found[0][1] - found[1][1] in (0, 1)


@pytest.mark.slow
def test_prompts_are_shared_in_every_process():
    model = tiny_model("llama")
    handle = lf.patch(model, lf.LofitConfig(offset="all", positions="answer"))
    randomize(handle)

    def work(rank):
        shared = SharedPrompts()
        said = [
            generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=5, batch_size=2, shared=shared) for _ in "ab"
        ]
        return said, shared.computed

    expected = generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=5, batch_size=2)
    found = in_processes(2, work)
    assert [said for said, _ in found] == [[expected] * 2] * 2
    assert all(0 < computed < 5 for _, computed in found)


def test_different_work_is_refused_in_all():
    model = patched()

    def work(rank):
        with pytest.raises(ValueError, match="expected the same prompts in every process, got process 0: 5 with"):
            generate_answers(model, TOKENIZER, PROMPTS[rank:], max_new_tokens=2)
        with ranks.apart():
            return generate_answers(model, TOKENIZER, PROMPTS[rank:], max_new_tokens=2)

    first, second = in_processes(2, work)
    assert len(first) == 5 and len(second) == 4


@pytest.mark.slow
def test_an_error_in_one_share_is_raised_in_all():
    model = patched()

    def work(rank):
        if rank == 1:
            model.forward = lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room"))
        with pytest.raises(Exception) as raised:
            generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=2, batch_size=2)
        return f"{type(raised.value).__name__}: {raised.value}"

    here = "ElsewhereError: process 1 of 2 failed in generating: MemoryError: no room"
    assert in_processes(2, work) == [here, "MemoryError: no room"]


@pytest.mark.slow
def test_fully_sharded_weights_are_gathered_equally_often():
    plain = patched()
    expected = everything(plain)

    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, forwards = patched(), []
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model.register_forward_hook(lambda *_: forwards.append(1))
        found = everything(model)
        division = Division(model, "anything")
        return found, len(forwards), division.gathers, Division(model, "anything", even=False).same

    found = in_processes(2, work)
    assert [f for _, f, *_ in found] == [found[0][1]] * 2
    assert [(gathers, same) for *_, gathers, same in found] == [(True, True)] * 2
    (texts, scores, judged, logs) = found[0][0]
    assert found[0][0] == found[1][0] and texts == expected[0] and judged[0] == expected[2][0]
    torch.testing.assert_close(logs, expected[3], rtol=0, atol=1e-5)
    for row, right in zip(scores, expected[1], strict=True):
        torch.testing.assert_close(row, right, rtol=0, atol=1e-5)


def test_an_error_in_the_midst_of_a_shared_forward_ends_all(monkeypatch):
    """What the one that fails says is not taken for weights."""
    monkeypatch.setattr(roll_call, "_GRACE", 0.3)
    model = patched()

    def work(rank):
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if rank == 1:
            model.generate = lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room"))
        with pytest.raises((MemoryError, ranks.ElsewhereError)) as raised:
            generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=2, batch_size=2)
        return str(raised.value)

    first, second = in_processes(2, work)
    assert "process 1 failed in generating: MemoryError: no room" in first and second == "no room"


def test_a_model_cut_through_its_layers_is_asked_by_all():
    model = patched()
    model._tp_size = 2

    def work(rank):
        division = Division(model, "anything")
        return division.same, division.mine([1, 2, 3]), division.put_together({rank: rank})

    every = [(1, True), (2, True), (3, True)]
    assert in_processes(2, work) == [(True, every, {0: 0}), (True, every, {1: 1})]
