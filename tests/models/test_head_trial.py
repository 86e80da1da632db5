"""Which heads are known, and what a model's loss is when its logits come in chunks."""

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import IGNORED
from lofit_fast.models import head_trial, linear_loss
from lofit_fast.models.head_trial import chunked_losses, frozen_head, longest_head, withheld
from lofit_fast.models.row_index import selecting_rows
from tests.library_versions import BY_ROW
from tests.oracle import randomize
from tests.tiny_families import tiny_family
from tests.tiny_models import FAMILIES, VOCAB, tiny_model, tokens

ROWS = []
for seed, length in enumerate((9, 6, 12)):
    ids = tokens(1, length, seed)[0].tolist()
    ROWS.append({"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]})


@pytest.fixture(autouse=True)
def all_is_long(monkeypatch):
    """Every batch is made in chunks, of 5 rows."""
    for module in (linear_loss, head_trial):
        monkeypatch.setattr(module, "LONG", 0)
    monkeypatch.setattr(linear_loss, "CHUNK", 5 * VOCAB * 4)


def spread(model, by=8.0):
    """Logits that are worth capping."""
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(by / head.std() / 32**0.5)
    return model.requires_grad_(False)


def results(handle, batch, head=None, count=None):
    """The loss and its gradient."""
    more = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
    with selecting_rows(handle.model), chunked_losses(handle.model, head):
        output = handle.model(**{**batch, "use_cache": False}, **more)
    gradients = torch.autograd.grad(output.loss, list(handle.parameters()))
    return output, [output.loss.detach(), torch.cat([g.flatten() for g in gradients])]


def patched(model):
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    randomize(handle, 0.1)
    return handle


def assert_close(got, expected, bound=1e-5):
    for ours, plain in zip(got, expected, strict=True):
        assert (ours - plain).norm() <= bound * plain.norm()


@pytest.mark.parametrize("logits", ["index", BY_ROW, "columns", "all"])
@pytest.mark.parametrize("count", [None, 50])
def test_chunked_loss_of_every_way_to_ask(logits, count):
    model = spread(tiny_model("gemma2"))
    handle = patched(model)
    head = frozen_head(model)
    batch = CompletionCollator(0, logits=logits)(ROWS)
    _, plain = results(handle, batch, count=count)
    output, ours = results(handle, batch, head, count)
    assert output.logits.shape[-2:] == (0, VOCAB)
    assert_close(ours, plain)
    # and the loss is the first, as a Trainer without names takes it
    assert output[0] is output.loss


def test_a_loss_that_ignores_the_number_of_labels_is_the_models():
    model = spread(tiny_model("llama"))
    own = model.loss_function
    assert frozen_head(model) is not None
    model.loss_function = lambda *args, num_items_in_batch=None, **options: own(*args, **options)
    assert frozen_head(model) is None
    # as this one does by itself
    assert frozen_head(tiny_family("granite_speech").requires_grad_(False)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_loss_of_families(family):
    model = spread(tiny_model(family))
    handle = patched(model)
    head = frozen_head(model)
    assert head.cap == (30.0 if family == "gemma2" else None)
    batch = CompletionCollator(0, logits="index")(ROWS)
    assert_close(results(handle, batch, head)[1], results(handle, batch)[1])


@pytest.mark.parametrize(
    ("family", "after"),
    [
        ("cohere", {"multiply": 0.0625}),
        ("granite", {"divide": 1.0}),
        ("gemma4_text", {"cap": None}),
        ("gemma3n_text", {"cap": 30.0}),
    ],
)
def test_scales_and_caps_are_the_familys(family, after):
    model = tiny_family(family)
    if family == "granite":
        model.config.logits_scaling = 6.0
        after = {"divide": 6.0}
    handle = patched(spread(model))
    head = frozen_head(model)
    assert {name: getattr(head, name) for name in after} == after
    batch = CompletionCollator(0, logits="index")(ROWS)
    assert_close(results(handle, batch, head)[1], results(handle, batch)[1])


def test_a_cap_shows_although_logits_are_small():
    # what a trial on the model's own logits would overlook
    model = spread(tiny_model("gemma2"), by=1e-3)
    assert frozen_head(model).cap == 30.0


def after_head(change):
    """A model that does something else to its logits, or in its loss."""

    def changed(model):
        forward = model.forward

        def other(*args, **kwargs):
            output = forward(*args, **kwargs)
            return change(output)

        model.forward = other

    return changed


def shifted(output):
    output.logits = output.logits + 1.0
    return output


def normed(output):
    output.logits = output.logits / output.logits.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return output


def penalized(output):
    if output.loss is not None:
        output.loss = output.loss + 1.0
    return output


@pytest.mark.parametrize("change", [shifted, normed, penalized])
def test_what_is_not_known_is_left_to_the_model(change):
    model = spread(tiny_model("llama"))
    assert frozen_head(model) is not None
    after_head(change)(model)
    assert frozen_head(model) is None


def test_heads_that_are_not_plain_are_left_to_the_model():
    class Other(nn.Linear):
        pass

    for change in (
        lambda head: head.weight.requires_grad_(),
        lambda head: head.register_forward_hook(lambda *_: None),
        lambda head: setattr(head, "__class__", Other),
        lambda head: setattr(head, "forward", lambda x: 2 * nn.functional.linear(x, head.weight)),
        lambda head: nn.utils.parametrizations.weight_norm(head),
    ):
        model = spread(tiny_model("llama", tie_word_embeddings=False))
        change(model.get_output_embeddings())
        assert frozen_head(model) is None
    assert frozen_head(nn.Linear(2, 2)) is None


def test_a_head_with_its_class_s_forward_put_back_is_plain():
    # as accelerate leaves what it has taken a hook off
    model = spread(tiny_model("llama", tie_word_embeddings=False))
    head = model.get_output_embeddings()
    head.forward = head.forward
    assert frozen_head(model) is not None


def test_a_trial_leaves_the_model_as_it_was():
    model = spread(tiny_model("gemma2")).train()
    state = torch.get_rng_state()
    assert frozen_head(model) is not None
    assert model.training and torch.get_rng_state().equal(state)
    head = model.get_output_embeddings()
    assert not (head._forward_hooks or head._forward_pre_hooks or model._forward_hooks or model._forward_pre_hooks)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_chunked_loss_leaves_no_trace(error):
    model = spread(tiny_model("llama"))
    handle = patched(model)
    head = frozen_head(model)
    batch = CompletionCollator(0, logits="index")(ROWS)
    failing = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(error("x"))) if error else None
    if error:
        with pytest.raises(error):
            results(handle, batch, head)
        failing.remove()
    results(handle, batch, head)
    handle.unpatch()
    module = model.get_output_embeddings()
    assert not (module._forward_hooks or module._forward_pre_hooks or model._forward_hooks or model._forward_pre_hooks)
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, VOCAB)


def test_short_batches_are_the_models(monkeypatch):
    model = spread(tiny_model("llama"))
    handle = patched(model)
    head = frozen_head(model)
    monkeypatch.setattr(linear_loss, "LONG", 100 * VOCAB * 4)
    batch = CompletionCollator(0, logits="index")(ROWS)
    output, ours = results(handle, batch, head)
    assert output.logits.shape[0] == sum(map(len, (row["labels"][2:] for row in ROWS)))
    assert all(a.equal(b) for a, b in zip(ours, results(handle, batch)[1], strict=True))


def test_a_model_is_tried_only_where_it_may_matter(monkeypatch):
    model = spread(tiny_model("llama"))
    monkeypatch.setattr(head_trial, "LONG", 2 * 10 * VOCAB * 4)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("tried"))
    assert longest_head(model, ROWS, 2) is None
    monkeypatch.undo()
    monkeypatch.setattr(head_trial, "LONG", 2 * 10 * VOCAB * 4 - 1)
    assert longest_head(model, ROWS, 2) is not None


def test_another_threads_rows_are_not_withheld():
    import threading

    model, shapes = spread(tiny_model("llama")), []
    ids = torch.tensor([[3, 4, 5]])
    with withheld(model.get_output_embeddings()):
        other = threading.Thread(target=lambda: shapes.append(model(ids).logits.shape))
        other.start()
        other.join()
        shapes.append(model(ids).logits.shape)
    assert shapes == [(1, 3, VOCAB), (1, 0, VOCAB)]


def test_an_interrupt_leaves_the_head_its_rows():
    model = spread(tiny_model("llama"))
    head, batch = (
        frozen_head(model),
        CompletionCollator(0, logits="all")([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]),
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    hook = model.model.norm.register_forward_pre_hook(interrupted)
    # whoever has the error, as a notebook does, has all that its frames have
    with pytest.raises(KeyboardInterrupt) as caught, chunked_losses(model, head):
        model(**batch)
    hook.remove()
    assert caught.tb is not None
    assert model(**batch).logits.shape == (1, 8, VOCAB)
