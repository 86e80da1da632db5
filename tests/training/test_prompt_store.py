"""Training on answers alone, over prompts that the base has computed once: what whole masked sequences give."""

import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.data.encode import IGNORED
from lofit_fast.evaluation.choices import length_refusal
from lofit_fast.models.prompt_states import PROMPTS, going_on, prompt_states
from lofit_fast.models.row_index import selecting_rows
from lofit_fast.models.trials import remembering
from lofit_fast.training.answer_batches import AnswerCollator, prompts_of, span
from lofit_fast.training.engine.attention_scope import attending
from lofit_fast.training.prompt_store import prompts_kept
from tests.library_versions import BY_ROW, called, takes_masks
from tests.masked_hook import MaskedHook
from tests.oracle import randomize, vectors_of
from tests.ordinary_sample import crossed
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model, tokens
from tests.training.tiny_runs import HELD_OUT, fit

# longer than a batch's own padding, and shorter than most prompts
WINDOW = {"sliding_window": 5}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
O_PROJ = "model.layers.N.self_attn.o_proj"
# name -> (what makes the model, where its projections are)
MODELS = {
    "llama": (lambda: tiny_model("llama"), O_PROJ),
    "gemma3": (lambda: tiny_model("gemma3", **MIXED), O_PROJ),
    "mistral": (lambda: tiny_model("mistral", **WINDOW), O_PROJ),
    "qwen2": (lambda: tiny_model("qwen2"), O_PROJ),
    "qwen3_moe": (lambda: tiny_family("qwen3_moe"), O_PROJ),
    "gpt2": (lambda: _without_dropout(tiny_family("gpt2")), "transformer.h.N.attn.c_proj"),
}
VECTORS = {
    "scale": {"scale": "all"},
    "offset": {"offset": [(0, 1), (1, 0), (1, 3)]},
    "both": {"scale": [(0, 0), (1, 1)], "offset": [(1, 2), (1, 1)]},
}


def _without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def row(length, answer, seed):
    ids = tokens(1, length, seed)[0].tolist()
    return {"input_ids": ids, "labels": [IGNORED] * (length - answer) + ids[-answer:]}


# prompts of 1 to 18 tokens, one of them twice, and answers of 1 to 4
ROWS = [row(6 + 5 * seed % 14, 1 + seed % 4, seed) for seed in range(7)] + [row(3, 2, 9), row(19, 1, 10)]
ROWS.append({"input_ids": [*ROWS[0]["input_ids"][:-1], 5, 6], "labels": [*ROWS[0]["labels"][:-1], 5, 6]})
WHOLE = CompletionCollator(0, logits="index")


def patched(model, **heads):
    handle = lf.patch(model, lf.LofitConfig(**(heads or VECTORS["both"]), positions="answer"))
    randomize(handle, 0.3)
    return handle


@contextmanager
def kept(handle, folder, rows=ROWS, whole=WHOLE, gb=1.0):
    how = {"pad_token_id": 0, "logits": whole.logits, "gb": gb, "folder": folder}
    with selecting_rows(handle.model), prompts_kept(handle, rows, whole, **how) as collator:
        yield collator


def results(model, batch, parameters):
    out = called(model, batch)
    return [out.logits.detach(), out.loss.detach(), *torch.autograd.grad(out.loss, parameters)]


def by_hooks(model, place, given, rows):
    """The same of whole sequences padded on the right, by hooks that write where a mask is true."""
    hook = MaskedHook(model, place, given)
    batch = CompletionCollator(0, logits=BY_ROW)(rows)
    hook.mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for i, one in enumerate(rows):
        first = next(at for at, label in enumerate(one["labels"]) if label != IGNORED)
        hook.mask[i, first - 1 :] = True
    parameters = [hook.parameters[key] for key in given]
    return results(model, batch, parameters)


# in the ordinary run each model with vectors of one kind; slow: of every kind
@pytest.mark.parametrize("name, heads", crossed(list(MODELS), list(VECTORS)))
def test_answers_alone_give_what_whole_masked_sequences_give(name, heads, tmp_path):
    make, place = MODELS[name]
    handle = patched(make(), **VECTORS[heads])
    given = vectors_of(handle)
    parameters = [getattr(handle.layers[layer], component) for layer, component in given]
    with kept(handle, tmp_path) as collator:
        assert isinstance(collator, AnswerCollator)
        got = results(handle.model, collator(ROWS), parameters)
    expected = by_hooks(make(), place, given, ROWS)
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "lofit_grouped", "lofit_causal"])
def test_attentions(attention, tmp_path):
    handle = patched(tiny_model("gemma3", **MIXED))
    expected = by_hooks(tiny_model("gemma3", **MIXED), O_PROJ, vectors_of(handle), ROWS)
    parameters = [getattr(handle.layers[layer], component) for layer, component in vectors_of(handle)]
    with attending(handle.model, attention), kept(handle, tmp_path) as collator:
        got = results(handle.model, collator(ROWS), parameters)
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [pytest.param("rows", marks=takes_masks), "columns", "all"])
def test_every_way_to_ask_for_logits(way, tmp_path):
    handle = patched(tiny_model("llama"))
    whole = CompletionCollator(0, logits=way)
    loss = handle.model(**whole(ROWS), use_cache=False).loss
    with kept(handle, tmp_path, whole=whole) as collator:
        assert isinstance(collator, AnswerCollator)
        torch.testing.assert_close(handle.model(**collator(ROWS)).loss, loss)


def test_only_what_the_labels_need_goes_through_the_model(tmp_path):
    handle = patched(tiny_model("llama"))
    seen = []
    handle.model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with kept(handle, tmp_path) as collator:
        seen.clear()
        handle.model(**collator(ROWS))
    answers = [sum(label != IGNORED for label in one["labels"]) for one in ROWS]
    assert seen == [(len(ROWS), max(answers), 32)]
    assert [end - start for start, end in map(span, ROWS)] == answers


def test_distinct_prompts_are_computed_once_and_shared_by_adapters(tmp_path):
    model = tiny_model("llama")
    handle = patched(model, offset=[(2, 1)])
    with kept(handle, tmp_path) as collator:
        # one prompt is there twice, and one has a single token
        assert len(collator.store) == len(prompts_of(ROWS)) == len(ROWS) - 2
    written = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.bin"))
    handle.unpatch()
    with kept(patched(model, scale="all"), tmp_path) as collator:
        assert isinstance(collator, AnswerCollator)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.bin")) == written
    # another base is another store
    with kept(patched(tiny_model("llama", seed=1)), tmp_path):
        assert len(list(tmp_path.rglob("*.bin"))) == 2


def test_what_does_not_fit_runs_whole(tmp_path):
    handle = patched(tiny_model("llama"))
    # 3 layers, keys and values, 2 heads of 16 numbers of 4 bytes
    half = sum(map(len, prompts_of(ROWS))) // 2 * 3 * 2 * 2 * 16 * 4
    how = {"gb": half / 1e9}
    with pytest.warns(UserWarning, match="are kept, batches with others"), kept(handle, tmp_path, **how) as collator:
        assert 0 < len(collator.store) < len(prompts_of(ROWS))
        whole = collator(ROWS)
        assert whole.keys() == WHOLE(ROWS).keys()
        short = [one for one in ROWS if len(one["input_ids"]) < 8]
        assert collator(short)["input_ids"].shape[1] < 5
        assert handle.model(**whole).loss.isfinite()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny_family("gpt2"), "Dropout has p=0.1"),
        (lambda: tiny_family("jamba"), ""),
        (lambda: tiny_family("qwen3_next"), ""),
        (lambda: _checkpointed(tiny_model("llama")), "gradient checkpointing"),
    ],
    ids=["dropout", "mamba", "linear attention", "checkpointing"],
)
def test_models_that_cannot_keep_prompts_say_so(model, reason, tmp_path):
    handle = patched(model(), scale="all")
    with (
        pytest.warns(UserWarning, match=f"prompts are not kept: .*{reason}.*same result"),
        kept(handle, tmp_path) as got,
    ):
        assert got is WHOLE
    assert not list(tmp_path.rglob("*.bin"))


def _checkpointed(model):
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_what_all_prompts_begin_with_runs_once(name, tmp_path):
    make, _ = MODELS[name]
    begin = tokens(1, 9, 99)[0].tolist()
    rows = [{"input_ids": begin + one["input_ids"], "labels": [IGNORED] * 9 + one["labels"]} for one in ROWS]
    handle, seen = patched(make()), []
    expected = results(handle.model, CompletionCollator(0, logits=BY_ROW)(rows), list(handle.parameters()))
    with ExitStack() as scopes:
        scopes.enter_context(remembering())
        assert length_refusal(handle.model) is None
        embedding = handle.model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        collator = scopes.enter_context(kept(handle, tmp_path, rows))
        filled = [shape for shape in seen if shape != (1, len(prompts_of(rows)[0]))]
        # the beginning, and the prompts' own tokens; then the trial
        assert filled[:2] == [(1, 8), (len(prompts_of(rows)), 18)]
        got = results(handle.model, collator(rows), list(handle.parameters()))
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_a_damaged_store_is_made_anew(tmp_path):
    handle = patched(tiny_model("llama"))
    with kept(handle, tmp_path):
        (path,) = tmp_path.rglob("*.bin")
    states = torch.from_file(str(path), shared=True, size=path.stat().st_size // 4)
    before = states.clone()
    # one number of one sequence, which a trial of the shortest and the longest would not meet
    states[len(states) // 2] += 1.0
    with pytest.warns(UserWarning, match="prompts: .*1 of .* made anew"), kept(handle, tmp_path) as collator:
        assert isinstance(collator, AnswerCollator)
    assert torch.from_file(str(path), shared=False, size=path.stat().st_size // 4).equal(before)


def test_fit_with_kept_prompts_and_without(tmp_path, monkeypatch):
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    recipe = lf.Recipe(tune_epochs=2, positions="answer")
    found = {}
    for gb in ("auto", 0):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "prompts")
            found[gb] = fit(
                tiny_model("llama"),
                tmp_path / str(gb),
                recipe,
                heads=[(0, 1), (2, 2)],
                eval_data=HELD_OUT,
                engine=lf.Engine(prompt_cache_gb=gb),
            )
        assert bool(list((tmp_path / "cache").rglob("*.bin")))
    for mine, whole in zip(found["auto"].history, found[0].history, strict=True):
        for name in ("loss", "eval_loss"):
            assert mine[name] == pytest.approx(whole[name], rel=1e-5)
    assert found["auto"].metrics["tune"]["exact_match"] == found[0].metrics["tune"]["exact_match"]


def test_a_bound_for_vectors_that_act_everywhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prompt_cache_gb=1.0 was asked for, but these vectors act on prompts too"):
        fit(tiny_model("llama"), tmp_path, engine=lf.Engine(prompt_cache_gb=1.0))


class Noted:
    """A scope that notes who goes in and out, and that no collector of garbage leaves."""

    log: list = []

    def __enter__(self):
        self.log.append("in")

    def __exit__(self, *error):
        self.log.append("out")


def test_an_interrupt_leaves_no_scope_around(monkeypatch):
    monkeypatch.setattr(Noted, "log", [])
    model = tiny_model("llama")
    with torch.no_grad():
        states, slots = prompt_states(model.model, [[3, 4, 5]], torch.device("cpu"))

    def interrupted(*_):
        raise KeyboardInterrupt

    model.model.norm.register_forward_pre_hook(interrupted)
    batch = {"input_ids": torch.tensor([[6]]), "position_ids": torch.tensor([[3]]), PROMPTS: states}
    with pytest.raises(KeyboardInterrupt), going_on(model, slots, Noted):
        model(**batch, attention_mask=torch.ones(1, 4, dtype=torch.int64))
    assert Noted.log == ["in", "out"]
