"""Models whose vectors act on answers alone equal a hook that is given each token's mask, or refuse the forward."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

import lofit_fast as lf
from lofit_fast.patching.cache_names import is_empty
from tests.masked_hook import MaskedHook, last_of_each
from tests.oracle import randomize, vectors_of
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model, tokens
from tests.tiny_others import tiny_other

LLAMA = r"model\.layers\.N\.self_attn\.o_proj"
GPT2 = r"transformer\.h\.N\.attn\.c_proj"
PLACES = {"llama": LLAMA, "gemma": LLAMA, "gemma3_text": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "mixtral": LLAMA}
CONFIGS = {
    "scale": {"scale": "all"},
    "offset": {"offset": "all"},
    "both": {"scale": [(0, 0), (2, 3)], "offset": [(0, 1), (1, 2), (2, 3)]},
}
B, S, BEGINS = 3, 13, (3, 9, 6)
SIDES = {"right": (13, 10, 8), "left": (13, 10, 8)}


def answering(family="llama", components="offset", dtype=torch.float32, **options):
    """(model, handle) with vectors large enough to matter."""
    model = tiny_family(family).to(dtype)
    model.set_attn_implementation(options.get("attention", "sdpa"))
    handle = lf.patch(model, lf.LofitConfig(**CONFIGS[components], positions="answer"))
    randomize(handle)
    return model, handle


def batch(side="right"):
    """(inputs with labels, mask): rows of 13, 10 and 8 tokens, whose answers begin after 4, 6 and 7 of them."""
    ids = tokens(B, S)
    real = torch.zeros(B, S, dtype=torch.bool)
    acts, labels = real.clone(), torch.full_like(ids, -100)
    for row, (length, begin) in enumerate(zip(SIDES[side], (3, 5, 6), strict=True)):
        start = 0 if side == "right" else S - length
        real[row, start : start + length] = True
        # the last token of the prompt predicts the first of the answer
        acts[row, start + begin : start + length] = True
        labels[row, start + begin + 1 : start + length] = ids[row, start + begin + 1 : start + length]
    ids = ids.masked_fill(~real, 0)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}, acts, real


def hooked(model, handle, family="llama"):
    """The same vectors in hooks, on a plain copy of the model."""
    plain = copy.deepcopy(model)
    lf.handle_of(plain).unpatch()
    return plain, MaskedHook(plain, PLACES[family], vectors_of(handle))


def close(got, expected, bound=1e-5):
    assert (got - expected).abs().max() <= bound * expected.abs().max()


# every family, and of one every setting
_FEW = [(family, "both", "sdpa", "right") for family in PLACES]
_FEW += [("gemma3_text", *rest) for rest in (("scale", "eager", "left"), ("offset", "sdpa", "left"))]
_MANY = itertools.product(PLACES, CONFIGS, ("sdpa", "eager"), SIDES)
_SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in _MANY if case not in _FEW]


@pytest.mark.parametrize("family, components, attention, side", _FEW + _SLOW)
def test_labels_say_where_answers_begin(family, components, attention, side):
    model, handle = answering(family, components, attention=attention)
    plain, hook = hooked(model, handle, family)
    inputs, hook.mask, real = batch(side)
    got, expected = model(**inputs), plain(**inputs)
    close(got.logits[real], expected.logits[real])
    close(got.loss, expected.loss)
    got.loss.backward()
    expected.loss.backward()
    for (number, component), (_, parameter) in zip(hook.parameters, handle.named_parameters(), strict=True):
        close(parameter.grad, hook.parameters[number, component].grad)


@pytest.mark.parametrize("components", CONFIGS)
def test_in_16_bits_it_is_as_near_as_the_hook(components):
    model, handle = answering("llama", components, torch.bfloat16)
    inputs, acts, real = batch()
    logits = model(**inputs).logits[real].double()
    exact, hook = hooked(model.double(), handle)
    hook.mask = acts
    expected = exact(**inputs).logits[real]
    eager, hook = hooked(model.to(torch.bfloat16), handle)
    hook.mask = acts
    theirs = eager(**inputs).logits[real].double()
    assert (logits - expected).norm() <= 1.1 * (theirs - expected).norm()


@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens_q", "seq_idx", "numbered mask"])
def test_examples_in_one_row_are_told_apart(kind):
    from lofit_fast.patching.answer_positions import where_it_acts

    ids = tokens(1, 12)
    labels = torch.full_like(ids, -100)
    labels[0, 3:5], labels[0, 9:12] = 7, 8
    ends = torch.tensor([0, 5, 8, 12])
    lengths = ends.diff()
    given = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends.int(),
        "seq_idx": torch.repeat_interleave(torch.arange(3), lengths)[None],
        "numbered mask": torch.repeat_interleave(torch.arange(1, 4), lengths)[None],
    }[kind]
    name = "attention_mask" if kind == "numbered mask" else kind
    expected = torch.zeros(1, 12, dtype=torch.bool)
    expected[0, 2:5] = expected[0, 8:] = True
    assert torch.equal(where_it_acts({"input_ids": ids, "labels": labels, name: given}), expected)


def test_a_row_that_is_an_answer_throughout_or_has_none():
    from lofit_fast.patching.answer_positions import answers_of

    labels = torch.tensor([[5, 6, 7], [-100, -100, -100], [9, -100, -100], [-100, -100, 4]])
    expected = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 1, 1]]).bool()
    assert torch.equal(answers_of(labels), expected)
    assert torch.equal(answers_of(labels[:, 1:], shifted=True), expected[:, :2])


GENERATE = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "several": {"num_return_sequences": 2, "do_sample": True},
}


@pytest.mark.parametrize("kind", GENERATE)
@pytest.mark.parametrize(
    "family", ["gemma3_text", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2"))]
)
def test_generation_acts_from_the_prompts_last_token_on(family, kind):
    model, handle = answering(family, "both")
    plain, hook = hooked(model, handle, family)
    hook.mask = last_of_each
    inputs, _, real = batch("left")
    inputs.pop("labels")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def run(model):
        torch.manual_seed(0)
        return model.generate(**inputs, **{**options, **GENERATE[kind]})

    got, expected = run(model), run(plain)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.stack(got.logits), torch.stack(expected.logits))
    with handle.folded():
        assert torch.equal(run(model).sequences, got.sequences)
    # and that is the whole text under a mask
    if kind == "greedy":
        whole = got.sequences[:, :-1]
        hook.mask = torch.zeros(whole.shape, dtype=torch.bool)
        hook.mask[:, S - 1 :] = True
        padded = torch.cat((inputs["attention_mask"], torch.ones(B, whole.shape[1] - S, dtype=torch.long)), 1)
        positions = (padded.cumsum(1) - 1).clamp(min=0)
        text = plain(input_ids=whole, attention_mask=padded, position_ids=positions).logits[:, S - 1 :]
        close(torch.stack(got.logits, 1), text)


REFUSED = {
    "chunked": ({"prefill_chunk_size": 3}, "prompt in chunks"),
    "chunks of one token": ({"prefill_chunk_size": 1}, "prompt in chunks"),
    "no cache": ({"use_cache": False}, "does not say where"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_generation_that_hides_where_the_prompt_ends_is_refused(kind):
    model, _ = answering()
    options, message = REFUSED[kind]
    ids = torch.cat((tokens(1, 4), tokens(1, 4)), 1)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, max_new_tokens=4, do_sample=False, **options)


def test_assisted_decoding_is_refused_for_the_model_and_right_for_the_assistant():
    ids = tokens(1, 8)
    model, _ = answering()
    with pytest.raises(ValueError, match="assisted decoding"):
        model.generate(ids, assistant_model=tiny_model("llama"), max_new_tokens=4, do_sample=False)
    main = tiny_model("llama", seed=3)
    expected = main.generate(ids, max_new_tokens=6, do_sample=False)
    # what an assistant proposes is checked: the text is the model's own, or the assistant refuses
    try:
        got = main.generate(ids, assistant_model=model, max_new_tokens=6, do_sample=False)
    except ValueError as error:
        assert "acting_on" in str(error)
    else:
        assert torch.equal(got, expected)


def test_a_model_that_keeps_nothing_in_its_cache_cannot_generate():
    model = tiny_family("openai-gpt")
    lf.patch(model, lf.LofitConfig(offset="all", positions="answer"))
    with pytest.raises(ValueError, match="keeps nothing in its cache"):
        model.generate(tokens(), max_new_tokens=3, do_sample=False)


CALLS = {
    "plain": (lambda model, ids: model(ids), "does not say where the answer begins"),
    "with a cache of its own": (lambda model, ids: model(ids, use_cache=True), "does not say where"),
    "padded on the right": (
        lambda model, ids: model(
            ids, attention_mask=(torch.arange(11) < 9).long().expand(2, 11), past_key_values=DynamicCache()
        ),
        "pad prompts on the left",
    ),
    "labels of a class": (lambda model, ids: model(ids, labels=torch.tensor([1, 2])), "expected labels of the tokens'"),
    "positions of several axes": (
        lambda model, ids: model(ids, labels=ids, position_ids=torch.arange(11).expand(3, 2, 11)),
        "3 dimensions",
    ),
    "a mask of one's own": (
        lambda model, ids: model(ids, labels=ids, attention_mask=torch.ones(2, 1, 11, 11)),
        "attention mask of one's own",
    ),
    "the decoder alone": (lambda model, ids: model.model(ids), "does not say where"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_forward_that_does_not_say_it_is_refused_before_anything_runs(call):
    model, handle = answering()
    ran = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(None))
    run, message = CALLS[call]
    with pytest.raises(ValueError, match=message):
        run(model, tokens())
    assert not ran
    # and nothing of it is left
    assert handle.acting.mask is None
    assert handle.acting.forwards == ()


def test_an_interrupted_forward_leaves_nothing_that_the_decoder_takes_for_its_own():
    model, handle = answering()

    def interrupt(*_):
        raise KeyboardInterrupt

    model(tokens(2, 1), past_key_values=DynamicCache())
    hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(2, 1), past_key_values=DynamicCache())
    hook.remove()
    with pytest.raises(ValueError, match="does not say where"):
        model.model(tokens())
    assert handle.acting.forwards == ()
    assert handle.acting.mask is None


def test_several_tokens_behind_a_cache_need_a_scope():
    model, handle = answering()
    plain, hook = hooked(model, handle)
    ids = tokens()
    cache = DynamicCache()
    model(ids[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match="6 tokens|5 tokens"):
        model(ids[:, 6:], past_key_values=cache)
    assert cache.get_seq_length() == 6
    with handle.acting_on("all"):
        got = model(ids[:, 6:], past_key_values=cache).logits
    hook.mask = (torch.arange(11) >= 5).expand(2, 11)
    close(got, plain(ids).logits[:, 6:])


# layers that keep states, and no keys, come first in them
@pytest.mark.parametrize("family", ["llama", "minimax", "lfm2", "jamba"])
def test_a_cache_is_empty_if_all_of_its_layers_are(family):
    model = tiny_family(family)
    handle = lf.patch(model, lf.LofitConfig(offset="all", positions="answer"))
    ids = tokens()
    with torch.no_grad():
        with handle.acting_on("all"):
            cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 tokens per row with a cache may be prompt or answer"):
            model(ids[:, :3], past_key_values=cache)
        fresh = type(cache)() if family == "minimax" else DynamicCache(config=model.config)
        assert is_empty(fresh) and not is_empty(cache)
        model(ids, past_key_values=fresh)
        assert not is_empty(fresh)


def test_a_cache_of_states_alone_is_empty_without_states():
    config = tiny_family("lfm2").config
    config.layer_types = ["conv", "conv", "conv"]
    cache = DynamicCache(config=config)
    assert is_empty(cache)
    cache.update_conv_state(torch.ones(1, 4, 3), 1)
    assert not is_empty(cache)
    cache.reset()
    assert is_empty(cache)
    cache.update_recurrent_state(torch.ones(1, 4, 3), 2)
    assert not is_empty(cache)


def test_what_does_not_tell_is_not_empty():
    assert not is_empty(object())


def test_a_static_cache_with_right_padding_is_refused():
    model, _ = answering()
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = tokens()
    mask = torch.zeros(2, 1, 11, 16, dtype=torch.bool)
    mask[:, :, :, :11] = torch.ones(11, 11).tril().bool()
    model(ids, attention_mask=mask, past_key_values=cache)
    mask[0, :, :, 10] = False
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model(ids, attention_mask=mask, past_key_values=StaticCache(config=model.config, max_cache_len=16))


def test_the_scope_says_it_for_whatever_runs_inside():
    model, handle = answering(components="both")
    plain, hook = hooked(model, handle)
    ids, hook.mask = tokens(), torch.rand(2, 11) > 0.5
    with handle.acting_on(hook.mask):
        close(model(ids).logits, plain(ids).logits)
        # also of the decoder by itself, and before what labels say
        close(model.model(ids)[0], plain.model(ids)[0])
        close(model(ids, labels=ids).logits, plain(ids).logits)
        with handle.acting_on("all"):
            hook.mask = None
            close(model(ids).logits, plain(ids).logits)
        with pytest.raises(ValueError, match="say it anew for each forward"):
            model(tokens(3, 11))
    assert handle.acting.mask is None
    with pytest.raises(TypeError, match="bools"):
        handle.acting_on(torch.ones(2, 11)).__enter__()
    with pytest.raises(ValueError, match="shape"):
        handle.acting_on(torch.ones(11, dtype=torch.bool)).__enter__()


def test_other_threads_see_no_scope_and_other_models_neither():
    from concurrent.futures import ThreadPoolExecutor

    (model, handle), (second, _) = answering(), answering("qwen3")
    with handle.acting_on("all"), ThreadPoolExecutor(1) as pool:
        model(tokens())
        for run in (lambda: pool.submit(model, tokens()).result(), lambda: second(tokens())):
            with pytest.raises(ValueError, match="does not say where"):
                run()


def test_disabled_is_the_base_and_asks_for_nothing():
    model, handle = answering()
    with handle.disabled():
        got = model(tokens()).logits
        model.generate(tokens(), max_new_tokens=2, do_sample=False, use_cache=False)
    assert torch.equal(got, handle.unpatch()(tokens()).logits)


def test_everywhere_is_the_model_of_all_positions_bit_for_bit():
    model, handle = answering(components="both")
    with handle.acting_on("all"):
        got = model(tokens()).logits
    vectors = handle.vectors()
    handle.unpatch()
    everywhere = lf.patch(model, lf.LofitConfig(**CONFIGS["both"]))
    with torch.no_grad():
        for key, rows in everywhere.vectors().items():
            rows.copy_(vectors[key])
    assert torch.equal(model(tokens()).logits, got)
    with pytest.raises(ValueError, match="every token"):
        everywhere.acting_on("all").__enter__()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_see_the_mask_again(reentrant):
    model, handle = answering(components="both")
    first, _, _ = batch()
    second = {**first, "labels": first["labels"].masked_fill(torch.arange(S) < 8, -100)}

    def gradients(*batches):
        handle.model.zero_grad()
        # one backward of several forwards, in which the last one's mask would be the nearest
        sum(model(**one, use_cache=False).loss for one in batches).backward()
        return [parameter.grad.clone() for parameter in handle.parameters()]

    model.train()
    expected = [sum(pair) for pair in zip(gradients(first), gradients(second), strict=True)]
    model._set_gradient_checkpointing(
        True, lambda *args, **kw: torch.utils.checkpoint.checkpoint(*args, use_reentrant=reentrant, **kw)
    )
    model.enable_input_require_grads()
    runs = []
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: runs.append(None))
    for got, wanted in zip(gradients(first, second), expected, strict=True):
        close(got, wanted)
    assert len(runs) == 4
    given = handle.unpatch().model.layers[0]._gradient_checkpointing_func
    assert type(given).__name__ == "function"


def test_somebody_elses_checkpoint_is_refused():
    model, handle = answering()
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kw: torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kw)
    inputs, acts, _ = batch()
    with handle.acting_on(acts):
        loss = model(**inputs, use_cache=False).loss
        with pytest.raises(ValueError, match="does not say where"):
            loss.backward()


def test_a_copy_finds_its_own_answers():
    model, handle = answering()
    copied = copy.deepcopy(model)
    inputs, acts, _ = batch()
    close(copied(**inputs).logits, model(**inputs).logits)
    with handle.acting_on(acts), pytest.raises(ValueError, match="does not say where"):
        copied(inputs["input_ids"])
    handle.unpatch()
    assert not model._forward_pre_hooks and copied._forward_pre_hooks
    model(inputs["input_ids"])


def test_an_encoder_has_the_prompt():
    with pytest.raises(ValueError, match="positions='all' for a model with an encoder"):
        lf.patch(tiny_other("t5"), lf.LofitConfig(offset="all", positions="answer"))


def test_beside_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    handle = lf.patch(model, lf.LofitConfig(offset="all", positions="answer"))
    randomize(handle)
    inputs, acts, real = batch()
    got = model(**inputs).logits
    with handle.acting_on(acts):
        said = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    close(said[real], got[real])
    assert model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False).shape == (2, 14)
    with pytest.raises(ValueError, match="does not say where"):
        model(input_ids=inputs["input_ids"])
    with model.disable_adapter():
        model(input_ids=inputs["input_ids"])


def test_labels_that_are_no_next_tokens_are_refused():
    from transformers import LlamaForTokenClassification

    model = LlamaForTokenClassification(tiny_model("llama").config)
    handle = lf.patch(model, lf.LofitConfig(offset="all", positions="answer"))
    ids = tokens(2, 5)
    with pytest.raises(ValueError, match="labels of a LlamaForTokenClassification are not tokens that follow"):
        model(ids, labels=torch.zeros_like(ids))
    with handle.acting_on("all"):
        assert model(ids, labels=torch.zeros_like(ids)).loss.isfinite()


def test_a_masked_language_model_says_nothing_by_its_labels():
    model = tiny_other("bert")
    lf.patch(model, lf.LofitConfig(offset="all", positions="answer"))
    ids = tokens(2, 5)
    with pytest.raises(ValueError, match="are not tokens that follow"):
        model(ids, labels=ids)
