"""The output head in generation: one product for all rows, its weight never copied."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lofit_fast as lf
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.models.trials import remembering
from tests.tiny_models import VOCAB, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

IDS = torch.arange(12).view(3, 4)


class Batched(TorchDispatchMode):
    """Counts the batched products with a side as long as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.bmm.default and out.shape[-1] == VOCAB
        return out


def batched_heads(run) -> int:
    with Batched() as seen:
        run()
    return seen.count


def test_a_patched_model_generates_with_one_product_per_token(family):
    model = tiny_model(family)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    assert batched_heads(lambda: model.generate(IDS, max_new_tokens=3, do_sample=False)) == 0
    with handle.folded():
        assert batched_heads(lambda: model.generate(IDS, max_new_tokens=3, do_sample=False)) == 0


def test_a_frozen_model_is_judged_with_one_product_per_token(llama):
    llama.requires_grad_(False)
    before = len(llama.lm_head._forward_pre_hooks)
    with remembering():
        # a trial has prompts of their own, for which nothing is copied
        generate_answers(llama, tiny_tokenizer(), ["ab", "c"], max_new_tokens=1)
        assert batched_heads(lambda: generate_answers(llama, tiny_tokenizer(), ["ab", "c", "de"])) == 0
    assert len(llama.lm_head._forward_pre_hooks) == before


def test_a_sliced_input_gives_the_same_logits(llama):
    sliced = torch.randn(3, 5, llama.config.hidden_size)[:, -1:]
    expected = torch.nn.functional.linear(sliced, llama.lm_head.weight)
    lf.patch(llama, lf.LofitConfig(offset="all"))
    assert not sliced.is_contiguous()
    torch.testing.assert_close(llama.lm_head(sliced), expected)


def test_unpatching_takes_the_hook_off_the_head(llama):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    assert len(llama.lm_head._forward_pre_hooks) == 1
    handle.unpatch()
    assert not llama.lm_head._forward_pre_hooks


def test_a_failure_while_judging_leaves_no_hook(llama, monkeypatch):
    hooks = llama.lm_head._forward_pre_hooks

    def failing(**_):
        assert len(hooks) == 1
        raise RuntimeError("no tokens today")

    monkeypatch.setattr(llama, "generate", failing)
    with pytest.raises(RuntimeError, match="no tokens"):
        generate_answers(llama, tiny_tokenizer(), ["ab"])
    assert not hooks


def test_a_head_may_be_called_by_keyword(llama):
    lf.patch(llama, lf.LofitConfig(offset="all"))
    hidden = torch.randn(2, 3, llama.config.hidden_size)
    torch.testing.assert_close(llama.lm_head(input=hidden), llama.lm_head(hidden))
