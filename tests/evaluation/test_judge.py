"""Greedy answers and scored candidates against one sequence at a time, without padding, batches or a cache."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

import lofit_fast as lf
from lofit_fast.data.encode import encode_prompt
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.judge import (
    constrained_accuracy,
    exact_match_accuracy,
    generate_answers,
    judge,
    score_candidates,
)
from lofit_fast.tasks import Example, Task
from lofit_fast.tasks.chat import Rendered
from lofit_fast.tasks.preference_rows import as_choice
from lofit_fast.tasks.task import MultipleChoice, Preference
from tests.oracle import randomize
from tests.tiny_models import FAMILIES, VOCAB, tiny_model
from tests.tiny_tokenizers import VOCABULARY, tiny_tokenizer

# prompts shorter and longer than a sliding window of 8, in no order of length
PROMPTS = ["abcdef", "q", "The quick brown fox jumps!", "x=1; y=2;"]
# one begins another; one ends where another goes on
CANDIDATES = [" yes", " y", "no", " yes, sir"]
TOKENIZER = tiny_tokenizer()
SLIDING = {"gemma2": {"sliding_window": 8}, "mistral": {"sliding_window": 8}}


@pytest.fixture(
    params=[*((name, {}) for name in FAMILIES), *SLIDING.items()], ids=lambda p: p[0] + "-sliding" * bool(p[1])
)
def model(request):
    """Each family in turn, and those with sliding windows with one that prompts are longer than."""
    name, changes = request.param
    model = tiny_model(name, **changes)
    _spread(model)
    return model


def _spread(model):
    """Larger weights: answers that depend on the prompt, and logits far apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0 if "embed" not in name else 2.0)


@torch.no_grad()
def greedy(model, prompt, steps):
    ids = encode_prompt(TOKENIZER, prompt)
    new = []
    while len(new) < steps and 2 not in new:
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return TOKENIZER.decode(new, skip_special_tokens=True)


@torch.no_grad()
def score(model, prompt, candidate):
    start = encode_prompt(TOKENIZER, prompt)
    end = [VOCABULARY[c] for c in candidate] + [2]
    log_p = model(torch.tensor([start + end]), use_cache=False).logits[0].float().log_softmax(-1)
    return sum(log_p[len(start) + i - 1, token] for i, token in enumerate(end))


def naive_scores(model):
    return torch.tensor([[score(model, prompt, c) for c in CANDIDATES] for prompt in PROMPTS])


@pytest.fixture(scope="module")
def one_by_one():
    """Of the tiny Llama with larger weights: answers of four tokens, and scores, a sequence at a time."""
    model = tiny_model("llama")
    _spread(model)
    return [greedy(model, prompt, 4) for prompt in PROMPTS], naive_scores(model)


def test_answers_equal_one_prompt_at_a_time(model):
    answers = generate_answers(model, TOKENIZER, PROMPTS, max_new_tokens=5, batch_size=3)
    expected = [greedy(model, prompt, 5) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert answers == expected


def test_scores_equal_a_full_forward_each(model):
    scores = score_candidates(model, TOKENIZER, PROMPTS, CANDIDATES)
    expected = naive_scores(model)
    assert (scores.shape, scores.dtype, scores.device.type) == (expected.shape, torch.float32, "cpu")
    assert expected.std() > 1e-2
    assert (scores - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_batches_change_nothing(llama, one_by_one, batch_size):
    _spread(llama)
    texts, expected = one_by_one
    answers = generate_answers(llama, TOKENIZER, PROMPTS, max_new_tokens=4, batch_size=batch_size)
    assert answers == texts
    scores = score_candidates(llama, TOKENIZER, PROMPTS, CANDIDATES, max_tokens=16 * batch_size)
    assert (scores - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("folded_before", [False, True])
def test_a_patched_model(llama, one_by_one, folded_before):
    _spread(llama)
    base = one_by_one[1]
    handle = lf.patch(llama, lf.LofitConfig(offset=[(0, 1), (2, 3)], scale=[(1, 0)]))
    randomize(handle, std=1.0)
    expected = naive_scores(llama)
    texts = [greedy(llama, prompt, 4) for prompt in PROMPTS]
    assert (expected - base).abs().max() > 1e-2
    if folded_before:
        with handle.folded():
            answers = generate_answers(llama, TOKENIZER, PROMPTS, max_new_tokens=4)
            scores = score_candidates(llama, TOKENIZER, PROMPTS, CANDIDATES)
    else:
        answers = generate_answers(llama, TOKENIZER, PROMPTS, max_new_tokens=4)
        scores = score_candidates(llama, TOKENIZER, PROMPTS, CANDIDATES)
    assert answers == texts
    assert (scores - expected).abs().max() <= 1e-4
    # no stale fold is left behind
    assert all(layer.here.kept is None for layer in handle.layers.values())
    with torch.no_grad():
        handle.layers[0].offset.mul_(3.0)
    changed = [score(llama, PROMPTS[0], candidate) for candidate in CANDIDATES]
    assert (torch.tensor(changed) - expected[0]).abs().max() > 1e-3


# what the rigged model says after a character; None is the end of the sequence
NEXT = {"=": "b", "#": "c", "b": None, "c": None}


def rigged():
    """A Llama whose layers do nothing, so that the next token depends on the last one alone, by NEXT."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(128)[:VOCAB])
        model.lm_head.weight.zero_()
        for character, follower in NEXT.items():
            model.lm_head.weight[2 if follower is None else VOCABULARY[follower], VOCABULARY[character]] = 1.0
    return model


EXAMPLES = [Example("q=", "b"), Example("qq#", "c"), Example("qqq=", "c"), Example("#", "d", ("B", "c"))]


def test_exact_match_accuracy():
    assert generate_answers(rigged(), TOKENIZER, ["q=", "#"]) == ["b", "c"]
    assert exact_match_accuracy(rigged(), TOKENIZER, EXAMPLES, batch_size=3) == 0.75


def test_constrained_accuracy():
    # "bc" begins with the best token, but the end comes right after it
    assert constrained_accuracy(rigged(), TOKENIZER, EXAMPLES, ["bc", "d", "b", "c"]) == 0.75
    # without the right answer in the set, the best of the wrong ones
    assert constrained_accuracy(rigged(), TOKENIZER, EXAMPLES[:2], ["d", "c"]) == 0.5


def test_nothing_to_judge(llama):
    assert generate_answers(llama, TOKENIZER, []) == []
    with pytest.raises(ValueError, match="at least one example"):
        exact_match_accuracy(llama, TOKENIZER, [])


def test_nothing_to_judge_by_candidates(llama):
    with pytest.raises(ValueError, match="at least one"):
        constrained_accuracy(llama, TOKENIZER, [], CANDIDATES)
    with pytest.raises(ValueError, match="candidate"):
        score_candidates(llama, TOKENIZER, PROMPTS, [])


def test_the_context_is_a_limit(llama):
    # bos + 58 + 5 = 64, the whole context
    assert len(generate_answers(llama, TOKENIZER, ["x" * 58], max_new_tokens=5)) == 1
    with pytest.raises(ValueError, match=r"60 tokens and 5 more .* context of 64"):
        generate_answers(llama, TOKENIZER, ["x", "x" * 59], max_new_tokens=5)
    assert score_candidates(llama, TOKENIZER, ["x" * 58], ["yyyy"]).isfinite().all()
    with pytest.raises(ValueError, match=r"60 tokens and 5 more .* context of 64"):
        score_candidates(llama, TOKENIZER, ["x" * 59], ["y", "yyyy"])


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back(llama, monkeypatch, training):
    llama.train(training)
    generate_answers(llama, TOKENIZER, PROMPTS, max_new_tokens=1)
    assert llama.training is training
    score_candidates(llama, TOKENIZER, PROMPTS, CANDIDATES)
    assert llama.training is training
    modes = []

    def failing(**options):
        modes.append(llama.training)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llama, "generate", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_answers(llama, TOKENIZER, PROMPTS[:1], max_new_tokens=1)
    assert modes == [False]
    assert llama.training is training


def test_nothing_is_tracked(llama):
    llama.requires_grad_(True)
    assert not score_candidates(llama, TOKENIZER, PROMPTS, CANDIDATES).requires_grad


def test_answers_are_greedy_whatever_the_model_was_saved_with(llama, one_by_one):
    # as of models whose generation_config.json asks for sampling and for penalties
    _spread(llama)
    llama.generation_config.update(do_sample=True, temperature=9.0, top_p=0.9, top_k=5, repetition_penalty=5.0)
    assert generate_answers(llama, TOKENIZER, PROMPTS, max_new_tokens=4) == one_by_one[0]


def test_generators_are_gone_through_once():
    assert exact_match_accuracy(rigged(), TOKENIZER, iter(EXAMPLES), max_new_tokens=4) == 0.75
    listed = constrained_accuracy(rigged(), TOKENIZER, EXAMPLES, CANDIDATES)
    assert constrained_accuracy(rigged(), TOKENIZER, iter(EXAMPLES), iter(CANDIDATES)) == listed


@pytest.mark.parametrize("name", ["prompts", "candidates"])
def test_one_text_is_no_list_of_texts(llama, name):
    texts = {"prompts": ["a"], "candidates": ["b"], name: "yes"}
    with pytest.raises(TypeError, match="expected a list of texts, got the one text 'yes'"):
        score_candidates(llama, TOKENIZER, **texts)


def test_judge_by_exact_match():
    judged = judge(rigged(), TOKENIZER, Task("t", [], EXAMPLES), batch_size=3)
    assert judged.metrics == {"exact_match": 0.75}
    assert judged.hits == [1.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="at least one example"):
        judge(rigged(), TOKENIZER, Task("t", EXAMPLES, []))


def test_judge_by_choices(llama):
    _spread(llama)
    candidates = (" yes", " no", " maybe", " x")
    shared = "Q: ab\nA: cd\n\n"
    prompts = ["Q: e?\nA:", "Q: what?\nA:", "Q: q1?\nA:"]
    rows = []
    for prompt in prompts:
        start = encode_prompt(TOKENIZER, shared + prompt)
        # no end of sequence: the benchmark scores the answer's own tokens
        ends = [[VOCABULARY[c] for c in text] for text in candidates]
        with torch.no_grad():
            log_p = [llama(torch.tensor([start + end])).logits[0].log_softmax(-1) for end in ends]
        rows.append(
            torch.stack([p[len(start) - 1 :][range(len(end)), end].sum() for p, end in zip(log_p, ends, strict=True)])
        )
    order = [row.argsort(descending=True).tolist() for row in rows]
    # the best answer first, behind a correct one, and behind a wrong one
    marked = [((order[0][0], order[0][3]), 0), ((order[1][0], order[1][1]), 1), ((order[2][1], order[2][3]), 0)]
    choices = [
        MultipleChoice(prompt, candidates, correct, correct[best])
        for prompt, (correct, best) in zip(prompts, marked, strict=True)
    ]
    judged = judge(llama, TOKENIZER, Task("t", [], [], choices=tuple(choices), shared_prefix=shared))
    assert judged.hits == [1.0, 1.0, 0.0]
    share = sum(row.softmax(0)[list(c.correct)].sum() for row, c in zip(rows, choices, strict=True)) / 3
    assert judged.metrics == {"mc1": pytest.approx(2 / 3), "mc2": pytest.approx(share.item(), abs=1e-4)}


@torch.no_grad()
def test_preferences_are_judged_with_their_end(llama):
    _spread(llama)
    one, other = Preference("Q: e?\nA:", " no", (" no way",)), Preference("Q: e?\nA:", " no way", (" no",))
    # as a chat template ends it
    rendered = Preference("Q: e?\nA:", Rendered(" no"), (Rendered(" no way"),))
    start = encode_prompt(TOKENIZER, one.prompt)

    def log_p(text, *more):
        ids = [VOCABULARY[c] for c in text] + list(more)
        rows = llama(torch.tensor([start + ids])).logits[0, len(start) - 1 :].log_softmax(-1)
        return sum(rows[i, token].item() for i, token in enumerate(ids))

    for preference, more in ((one, [2]), (other, [2]), (rendered, [])):
        scores = [log_p(text, *more) for text in (preference.chosen, *preference.rejected)]
        judged = judge(llama, TOKENIZER, Task("t", [], [], choices=(as_choice(preference),)))
        share = torch.tensor(scores).softmax(0)[0].item()
        assert judged.metrics == {"mc1": float(scores[0] > scores[1]), "mc2": pytest.approx(share, abs=1e-4)}
    # the end of the shorter one can be unlikely, so that not it alone ever wins
    llama.lm_head.weight[2] = -llama.lm_head.weight[2] * 50
    ended = [log_p(" no", 2), log_p(" no way", 2)]
    tasks = [Task("t", [], [], choices=(as_choice(preference),)) for preference in (one, other)]
    assert [judge(llama, TOKENIZER, task).hits for task in tasks] == [[float(a > b)] for a, b in (ended, ended[::-1])]


def test_the_end_is_scored_once_and_by_question(llama):
    _spread(llama)
    both = score_choices(llama, TOKENIZER, ["ab", "ab"], [["c</s>", "c"]] * 2, end=[True, False])
    assert both[0][0] == both[0][1] == both[1][0] != both[1][1]
    with pytest.raises(ValueError, match="expected end for each question, got 1 for 2 questions"):
        score_choices(llama, TOKENIZER, ["ab", "ab"], [["c"]] * 2, end=[True])


def test_choices_of_the_same_tokens_are_refused(llama):
    twins = Preference("ab", "c", ("d", "c</s>"))
    task = Task("t", [], [], choices=(as_choice(Preference("ab", "c", ("d",))), as_choice(twins)))
    with pytest.raises(ValueError, match="question 2: the choices 'c' and 'c</s>' have the same tokens"):
        judge(llama, TOKENIZER, task)
    # wrong ones may be the same, and so may correct ones
    alike = MultipleChoice("ab", ("c", "d", "d", "c"), correct=(0, 3), best=0)
    assert judge(llama, TOKENIZER, Task("t", [], [], choices=(alike,))).hits


def test_choices_take_no_batch_size(llama):
    choices = (MultipleChoice("a?", (" b", " c"), correct=(0,), best=0),)
    with pytest.raises(ValueError, match="got batch_size=4, but the choices of the task 't' are scored by tokens"):
        judge(llama, TOKENIZER, Task("t", [], [], choices=choices), batch_size=4)


@pytest.mark.slow
def test_many_threads_judge_as_one_does(llama):
    _spread(llama)
    handle = lf.patch(llama, lf.LofitConfig(offset=[(0, 1), (2, 3)], scale=[(1, 0)]))
    randomize(handle, std=1.0)
    tasks = [Task("mine", [], [Example(prompt, "no") for prompt in PROMPTS[i : 2 * i + 2]]) for i in range(3)]
    llama.train()

    def judged(number):
        with handle.disabled() if number % 2 else nullcontext():
            task = tasks[number % 3]
            prompts = [example.prompt for example in task.validation]
            texts = generate_answers(llama, TOKENIZER, prompts, max_new_tokens=4, batch_size=1 + number % 2)
            return texts, judge(llama, TOKENIZER, task, batch_size=2)

    alone = [judged(number) for number in range(8)]
    with ThreadPoolExecutor(8, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        assert list(pool.map(judged, range(8))) == alone
    assert all(module.training for module in llama.modules())
    assert handle.scopes.plain and not handle.scopes.folding()
    assert all(layer.here.kept is None for layer in handle.layers.values())
