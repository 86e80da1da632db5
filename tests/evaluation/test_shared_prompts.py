"""Prompts computed once for several adapters: the answers are those that each adapter gives by itself."""

import warnings

import pytest
import torch

import lofit_fast as lf
from lofit_fast.evaluation.judge import generate_answers, judge
from lofit_fast.evaluation.shared_prompts import SharedPrompts
from lofit_fast.models.trials import remembering
from lofit_fast.tasks.task import Example, Task
from tests.oracle import randomize
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

PROMPTS = ["a+b=", "a+b+c+d+e+f=", "b", "c+d="]
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def adapted(model, seed, positions="answer"):
    handle = lf.patch(model, lf.LofitConfig(scale=[(0, 1)], offset=[(1, 2), (2, 0)], positions=positions))
    randomize(handle, 2.0, seed)
    return handle


def answers(model, shared=None):
    how = {"max_new_tokens": 2, "batch_size": 3, "shared": shared}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "prompts are not shared")
        return generate_answers(model, tiny_tokenizer(), PROMPTS, **how)


@pytest.mark.parametrize(
    "family, gb", [("llama", 1.0), ("gemma3", 1.0), ("llama", 0), pytest.param("gemma3", 0, marks=pytest.mark.slow)]
)
def test_adapters_share_prompts(family, gb):
    model = tiny_model(family, initializer_range=0.3, **(WINDOW if family == "gemma3" else {}))
    shared, found = SharedPrompts(gb), set()
    for seed in range(2):
        handle = adapted(model, seed)
        expected = answers(model)
        assert answers(model, shared) == expected
        found.add(tuple(expected))
        handle.unpatch()
    assert answers(model, shared) == answers(model)
    assert len(found) > 1
    # each time anew where there is no room
    assert (shared.computed == len(PROMPTS)) == (gb > 0)


def test_only_last_prompt_tokens_and_answers_run_again():
    model = tiny_model("llama")
    shared, seen = SharedPrompts(), []
    adapted(model, 0)
    # what is tried of the model is tried once
    with remembering():
        answers(model, shared)
        model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        answers(model, shared)
    assert set(seen) == {1}


def test_judging_with_shared_prompts():
    model = tiny_model("llama")
    adapted(model, 1)
    examples = [Example(prompt, "a") for prompt in PROMPTS]
    task = Task("sums", examples, examples)
    shared = SharedPrompts()
    assert judge(model, tiny_tokenizer(), task, shared=shared) == judge(model, tiny_tokenizer(), task)
    assert shared.computed == len(PROMPTS)


def test_what_cannot_be_shared_is_refused_or_said():
    model = tiny_model("llama")
    shared = SharedPrompts()
    answers(model, shared)
    with pytest.raises(ValueError, match="another model"):
        answers(tiny_model("llama"), shared)
    adapted(model, 0, positions="all")
    with pytest.raises(ValueError, match="act on them"):
        answers(model, shared)
    with pytest.raises(ValueError, match="gb >= 0, got -1"):
        SharedPrompts(-1)
    linear = tiny_family("qwen3_next")
    with pytest.warns(UserWarning, match="prompts are not shared"):
        found = generate_answers(linear, tiny_tokenizer(), PROMPTS, max_new_tokens=3, shared=SharedPrompts())
    assert found == generate_answers(linear, tiny_tokenizer(), PROMPTS, max_new_tokens=3)


def test_keys_that_depend_on_the_length_of_a_sequence_are_not_shared():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope)
    with pytest.warns(UserWarning, match="depends on the length of the whole sequence"):
        found = generate_answers(model, tiny_tokenizer(), PROMPTS, max_new_tokens=3, shared=SharedPrompts())
    assert found == generate_answers(model, tiny_tokenizer(), PROMPTS, max_new_tokens=3)


def test_a_model_is_tried_on_the_first_prompts_that_there_is_something_to_keep_of(monkeypatch):
    model, shared, tried = tiny_model("llama"), SharedPrompts(), []
    monkeypatch.setattr(SharedPrompts, "_disagreement", lambda *_: tried.append(None))
    with torch.no_grad():
        assert shared.cache(model, [[5], [6]]) is None
        assert shared.cache(model, [[5], [6, 7]]) is not None
        assert shared.cache(model, [[8, 9]]) is not None
    assert len(tried) == 1
