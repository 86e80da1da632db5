"""Which logits a forward can be asked for, stock ones and others: found before a run, and the same loss in each way."""

import threading
import types

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator, stock_logits
from lofit_fast.data.pack import PackedCollator
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.logprobs import log_probs
from lofit_fast.models.logit_rows import SCOPED, logit_rows
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.models.trials import trial_examples
from lofit_fast.training import Engine
from lofit_fast.training.engine.auto import settle
from tests.library_versions import BY_ROW
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import QUICK, assert_same_state, fit, state_of, vectors


def by_places(self, input_ids=None, labels=None, logits_to_keep=0, shift_labels=None, **options):
    """A forward that slices by places alone, as Liger's does."""
    hidden = self.model(input_ids=input_ids, **options).last_hidden_state
    places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.lm_head(hidden[:, places, :])
    return self._answer(logits, labels, shift_labels)


def whole(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, use_cache=None):
    """A forward of somebody's own: all logits, whatever is wanted."""
    options = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
    logits = self.lm_head(self.model(input_ids=input_ids, **options).last_hidden_state)
    return self._answer(logits, labels, None)


def deaf(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **options):
    """The same, which takes everything and looks at nothing."""
    return whole(self, input_ids, attention_mask, position_ids, labels)


def _answer(self, logits, labels, shift_labels):
    from transformers.modeling_outputs import CausalLMOutputWithPast

    loss = None
    if labels is not None:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), shift_labels.flatten())
    return CausalLMOutputWithPast(loss=loss, logits=logits)


FORWARDS = {"rows": None, "columns": by_places, "all": whole, "all, in silence": deaf}


def with_forward(model, kind):
    """The model with a forward of its own, as tools put one there."""
    model._answer = types.MethodType(_answer, model)
    if FORWARDS[kind] is not None:
        model.forward = types.MethodType(FORWARDS[kind], model)
    return model


@pytest.mark.parametrize("kind", FORWARDS)
@pytest.mark.parametrize("patched", [False, True])
def test_what_a_forward_takes_is_found(kind, patched, llama):
    model = with_forward(llama, kind)
    if patched:
        lf.patch(model, lf.LofitConfig(scale="all", offset="all", init_std=0.1))
    before = state_of(model)
    assert logit_rows(model) == (stock_logits() if kind == "rows" else kind.split(",")[0])
    # the head takes fewer rows of any forward that takes their labels
    assert logit_rows(model, SCOPED) == ("all" if kind.startswith("all") else "index")
    assert_same_state(model, before)


@pytest.mark.parametrize("collate", [CompletionCollator, PackedCollator])
@pytest.mark.parametrize("logits", ["index", "columns", "all"])
def test_every_way_has_the_same_loss_and_gradients(collate, logits, llama):
    from lofit_fast.cpu.attention import GROUPED
    from lofit_fast.training.engine.attention_scope import attending

    handle = lf.patch(llama, lf.LofitConfig(scale="all", offset="all", init_std=0.1))
    rows = trial_examples(llama)
    rows[0]["labels"][-3:-1] = [-100, -100]
    with attending(llama, GROUPED), selecting_rows(llama):
        losses = [llama(**collate(0, logits=way)(rows)).loss for way in (BY_ROW, logits)]
        gradients = [torch.autograd.grad(loss, list(handle.parameters())) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0])
    # the very same products
    assert logits != "index" or losses[1].equal(losses[0])
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
        assert logits != "index" or got.equal(expected)


def test_another_threads_call_gets_all_its_logits(llama):
    batch = CompletionCollator(0, logits="index")(trial_examples(llama))
    seen = []

    def meanwhile(*_):
        """Once, in the midst of a call with an index: a call of another thread without one."""
        inside.remove()
        other = threading.Thread(target=lambda: seen.append(llama(batch["input_ids"]).logits.shape))
        other.start()
        other.join()

    with selecting_rows(llama):
        inside = llama.model.register_forward_pre_hook(meanwhile)
        kept = llama(**batch, use_cache=False).logits
    assert seen == [(*batch["input_ids"].shape, llama.config.vocab_size)]
    assert kept.shape == (len(batch["kept_rows"]), llama.config.vocab_size)


def test_another_way_is_refused():
    for collate in (CompletionCollator, PackedCollator):
        with pytest.raises(ValueError, match="rows, index, columns, all, got 'mask'"):
            collate(0, logits="mask")


@pytest.mark.parametrize("kind", ["columns", "all", "all, in silence"])
def test_fit_and_scores_with_a_forward_of_another_kind(kind, tmp_path):
    # two labels of different length, so that rows and columns differ
    examples = [{"prompt": f"{a}=", "completion": a * n} for a, n in zip("abcdefgh", (1, 3) * 4, strict=True)]
    engine = lf.Engine(attention="sdpa", packing=False)
    expected = fit(tiny_model("llama"), tmp_path / "stock", QUICK, examples, engine=engine)
    other = fit(with_forward(tiny_model("llama"), kind), tmp_path / "other", QUICK, examples, engine=engine)
    for got, wanted in zip(vectors(other.handle), vectors(expected.handle), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    models = expected.handle.model, other.handle.model
    scores = [score_choices(m, tiny_tokenizer(), ["a", "b"], [["x", "yy"], ["z"]]) for m in models]
    for got, wanted in zip(scores[1], scores[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    rows = trial_examples(models[0])
    stock, mine = (log_probs(m, rows, 0) for m in models)
    assert mine == pytest.approx(stock, rel=1e-4)


@pytest.mark.parametrize("kind", ["columns", "all"])
def test_the_engine_settles_for_a_forward_of_another_kind(kind, llama):
    handle = lf.patch(with_forward(llama, kind), lf.LofitConfig(offset="all"))
    settled, _ = settle(handle, Engine(), trial_examples(llama), 0, 2, 3)
    assert "auto" not in vars(settled).values()


@pytest.mark.parametrize("order", ["Liger first", "LoFiT first"])
def test_liger_in_either_order(order, tmp_path):
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        pytest.skip(f"liger-kernel is not installed: {error}")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is what runs Liger on CPU tensors, and it is off where there is a GPU")

    def apply(model):
        off = {"rope": False, "swiglu": False, "rms_norm": False, "cross_entropy": False}
        apply_liger_kernel_to_llama(**off, fused_linear_cross_entropy=True, model=model)

    models = [tiny_model("llama"), tiny_model("llama")]
    if order == "Liger first":
        apply(models[1])
    handles = [lf.patch(model, lf.LofitConfig(scale="all", offset="all", init_std=0.1)) for model in models]
    if order == "LoFiT first":
        apply(models[1])
    assert logit_rows(models[1]) == "columns"
    rows = trial_examples(models[0])
    for mode in (False, True):
        stock = models[0].train(mode)(**CompletionCollator(0)(rows), use_cache=False).loss
        # in training Liger computes logits and loss in one kernel
        fused = models[1].train(mode)(**CompletionCollator(0, logits="columns")(rows), use_cache=False).loss
        torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(x, list(h.parameters())) for x, h in zip((stock, fused), handles, strict=True)]
        for got, expected in zip(gradients[1], gradients[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
