"""Attention without a mask on batches padded on the right: the model's own results, and masks where they are needed."""

import json
import threading

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.padding import PADDED_RIGHT, padded, padded_on_the_right
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.patching.architectures import text_config
from lofit_fast.training.engine import Engine, collator_of, prepared
from lofit_fast.training.engine import causal_attention as causal
from lofit_fast.training.engine.attention_choice import attention_refusal
from lofit_fast.training.engine.attention_scope import attending
from lofit_fast.training.engine.auto import settle
from lofit_fast.training.engine.causal_attention import CAUSAL, causal_attention, shares_keys
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model, tokens
from tests.training.engine.engine_families import FAMILIES, WRAPPERS, family_model
from tests.training.tiny_runs import fit

# one of each kind; the others are slow in sum only
QUICK = ("gemma3", "deepseek_v3", "mixtral", "llama4", "llava")
# torch's kernels know neither caps nor sinks
REFUSED = {"gemma2": "softcap", "gpt_oss": "s_aux"}


def rows(lengths=(13, 9, 6)):
    made = []
    for seed, length in enumerate(lengths):
        ids = tokens(1, length, seed)[0].tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * (length - 3) + ids[-3:]})
    return made


def results(model, batch):
    """Logits of labelled tokens, and the loss's gradients of the first layer."""
    parameters = [p for p in model.get_input_embeddings().parameters()]
    with selecting_rows(model):
        logits = model(**{**batch, "use_cache": False}).logits
    loss = nn.functional.cross_entropy(logits.double(), batch["shift_labels"])
    return [logits.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*FAMILIES, *WRAPPERS)],
)
def test_right_padding_needs_no_mask_or_is_refused(family):
    model = family_model(family)
    refusal = attention_refusal(model, CAUSAL)
    assert (refusal is not None) == (family in REFUSED) or text_config(model)._attn_implementation != "sdpa"
    if refusal is not None:
        return
    batch = CompletionCollator(0, logits="index")(rows())
    expected = results(model, batch)
    with attending(model, CAUSAL):
        got = results(model, batch)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 2e-4 * other.abs().max()


@pytest.mark.parametrize("family", REFUSED)
def test_what_torch_does_not_know_is_refused(family):
    model = family_model(family)
    assert REFUSED[family] in attention_refusal(model, CAUSAL)


def masks_given(model, call):
    """The masks that torch's attention is given while something calls the model."""
    seen, attend = [], nn.functional.scaled_dot_product_attention

    def watched(query, key, value, mask=None, *args, **options):
        seen.append((mask, options["is_causal"], key.shape[1]))
        return attend(query, key, value, mask, *args, **options)

    with pytest.MonkeyPatch.context() as patch, attending(model, CAUSAL):
        patch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        call()
    return seen


def test_torch_is_given_no_mask(llama):
    batch = CompletionCollator(0, logits="columns")(rows())
    assert all(mask is None and causal for mask, causal, _ in masks_given(llama, lambda: llama(**batch)))


def test_windows_are_masked_where_rows_are_longer():
    model = tiny_model("gemma3", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    collate = CompletionCollator(0, pad_to_multiple_of=1, logits="columns")
    long, short = (collate(rows(lengths)) for lengths in ((13, 9), (7, 5)))
    given = [mask is None for mask, *_ in masks_given(model, lambda: model(**long, use_cache=False))]
    assert given == [False, True, False]
    assert all(mask is None for mask, *_ in masks_given(model, lambda: model(**short, use_cache=False)))


def test_padding_on_the_left_is_masked_inside_a_training_too(llama):
    ids, mask = padded([row["input_ids"] for row in rows()], 0, side="left")
    expected = llama(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    answers = llama.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    with attending(llama, CAUSAL):
        # a training step before, which is known to be padded on the right
        llama(**CompletionCollator(0, logits="columns")(rows()))
        got = llama(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert llama.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False).equal(answers)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_somebodys_own_is_masked_whatever_targets_it_brings(llama):
    ids, mask = padded([row["input_ids"] for row in rows()], 0, side="left")
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "shift_labels": ids.clone()}
    assert all(given is not None for given, *_ in masks_given(llama, lambda: llama(**batch)))


def test_calls_in_several_threads_do_not_undo_each_other(llama):
    batch, seen = CompletionCollator(0, logits="columns")(rows()), []
    inside, left = {name: threading.Event() for name in "ab"}, threading.Event()

    def in_order(*_):
        """Both are inside before the one that came first leaves, and the other leaves after it."""
        name = threading.current_thread().name
        inside[name].set()
        assert (inside["b"] if name == "a" else left).wait(30)

    def call():
        llama(**batch)
        left.set()
        seen.append(PADDED_RIGHT.get())

    llama.lm_head.register_forward_pre_hook(in_order)
    with attending(llama, CAUSAL):
        calls = [threading.Thread(target=call, name=name) for name in "ab"]
        calls[0].start()
        assert inside["a"].wait(30)
        calls[1].start()
        for each in calls:
            each.join()
    assert seen == [False, False]


def test_the_last_tokens_of_a_row_look_at_all_before():
    # its layers with shared keys run on the last tokens alone
    model, (row, *_) = tiny_family("gemma4_text shared keys"), rows()
    ids = torch.tensor([row["input_ids"]])
    expected = model(ids, use_cache=False).logits[:, -4:]
    with attending(model, CAUSAL):
        got = model(ids, use_cache=False, logits_to_keep=4).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_failed_step_leaves_nothing_behind(llama):
    ids, mask = padded([row["input_ids"] for row in rows()], 0, side="left")
    with attending(llama, CAUSAL):
        hook = llama.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama(**CompletionCollator(0, logits="columns")(rows()))
        hook.remove()
    assert all(given is not None for given, *_ in masks_given(llama, lambda: llama(ids, attention_mask=mask)))


def test_nor_does_an_interrupted_one(llama):
    def interrupted(*_):
        raise KeyboardInterrupt

    with attending(llama, CAUSAL), pytest.raises(KeyboardInterrupt):
        llama.lm_head.register_forward_pre_hook(interrupted)
        llama(**CompletionCollator(0, logits="columns")(rows()))
    assert not PADDED_RIGHT.get()


def test_whoever_pads_on_the_right_can_say_so(llama):
    ids, mask = padded([row["input_ids"] for row in rows()], 0)
    with padded_on_the_right():
        given = masks_given(llama, lambda: llama(ids, attention_mask=mask))
    assert all(mask is None for mask, *_ in given)


@pytest.mark.parametrize(
    ("dtype", "widths", "masked", "expected"),
    [
        (torch.bfloat16, (64, 64), False, True),
        (torch.float16, (256, 256), False, True),
        (torch.bfloat16, (512, 512), False, False),
        (torch.bfloat16, (192, 128), False, False),
        (torch.bfloat16, (64, 64), True, False),
        (torch.float32, (64, 64), False, False),
    ],
)
def test_keys_are_shared_where_torch_has_a_fused_kernel(dtype, widths, masked, expected):
    assert shares_keys(dtype, *widths, masked) is expected


def test_keys_are_repeated_elsewhere(llama):
    batch = CompletionCollator(0, logits="columns")(rows())
    assert {heads for *_, heads in masks_given(llama, lambda: llama(**batch))} == {4}
    half = tiny_model("llama", torch.bfloat16)
    assert {heads for *_, heads in masks_given(half, lambda: half(**batch))} == {2}


def test_keys_are_repeated_where_flash_attention_does_not_run(monkeypatch):
    capability = {0: (7, 5), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
    assert [causal._flash_runs_on(torch.device("cuda", index)) for index in capability] == [False, True]
    assert causal._flash_runs_on(torch.device("cpu"))


@pytest.mark.slow
def test_compiled_layers_take_it_whole(llama, quick_compiler):
    batches = [CompletionCollator(0, logits="columns")(rows(lengths)) for lengths in ((13, 9, 6), (20, 18), (7, 5))]
    expected = [llama(**batch, use_cache=False).loss for batch in batches]
    with prepared(llama, Engine(attention=CAUSAL, compile=True)):
        got = [llama(**batch, use_cache=False).loss for batch in batches]
    torch.testing.assert_close(got, expected)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_more_than_a_mask_is_refused(llama):
    query = torch.ones(1, 4, 3, 8)
    with pytest.raises(ValueError, match="LlamaModel asks for position_bias, which lofit_causal attention does not"):
        causal_attention(llama.model, query, query, query, None, position_bias=query)


def test_one_can_ask_for_it_and_a_run_keeps_it(llama):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    settled, said = settle(handle, Engine(attention=CAUSAL), rows(), 0, 2, 1)
    assert (settled.attention, settled.packing) == (CAUSAL, False)
    assert f"engine: {CAUSAL} attention" in said


def test_a_run_with_it_learns_what_one_with_the_models_own_does(tmp_path):
    results = [
        fit(tiny_model("llama"), tmp_path / name, engine=lf.Engine(attention=name, packing=False))
        for name in ("sdpa", CAUSAL)
    ]
    expected, got = (result.history for result in results)
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    assert results[1].handle.model.config._attn_implementation == "sdpa"
    assert json.loads((tmp_path / CAUSAL / "state.json").read_text())["engine"]["tune"]["attention"] == CAUSAL


def test_packed_batches_of_flash_attention_bring_their_boundaries():
    batch = collator_of(Engine(attention="flash_attention_2", packing=True), 0)(rows((5, 3, 4)))
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 8, 12]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (5, 5)
    assert "cu_seq_lens_q" not in collator_of(Engine(attention="sdpa", packing=True), 0)(rows((5, 3)))
