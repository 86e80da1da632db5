"""Packed scores against a whole forward per choice, in float64; what runs once, what bounds memory, what is refused."""

import pytest
import torch

import lofit_fast as lf
import lofit_fast.evaluation.choices as scoring
from lofit_fast.data.encode import encode_prompt
from lofit_fast.evaluation.choice_metrics import mc1, mc2
from lofit_fast.evaluation.choices import packing_refusal, score_choices
from lofit_fast.models.trials import remembering
from tests.oracle import randomize
from tests.ordinary_sample import slow_if
from tests.packed_linears import AwqLike
from tests.tiny_models import FAMILIES, tiny_model, tokens
from tests.tiny_tokenizers import VOCABULARY, tiny_tokenizer
from tests.training.engine.engine_families import family_model

TOKENIZER = tiny_tokenizer()
# longer than a sliding window of 8
PREFIX = "Q: a? A: b. "
QUESTIONS = ["abcdef", "q", "The quick brown fox?", "x=1"]
# of any number and length; some begin others
CHOICES = [[" yes", " y", "no", " yes, sir"], ["a"], ["xx", "xy", "zzzzz"], ["b", "bb"]]
CASES = [
    # in the ordinary run one attention a family; slow: both
    *slow_if(lambda family, *_: family not in ("llama", "gemma2"), [(family, "eager", {}) for family in FAMILIES]),
    # Gemma 2 caps its attention scores, which sdpa cannot
    *((family, "sdpa", {}) for family in FAMILIES if family != "gemma2"),
    *((family, "eager", {"sliding_window": 8}) for family in ("gemma2", "mistral")),
    ("qwen3", "sdpa", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
]


def exact_model(family, attention="eager", **changes):
    """In float64, with weights large enough that answers depend on the prompt."""
    model = tiny_model(family, torch.float64, **changes)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0 if "embed" in name else 4.0)
    return model


@torch.no_grad()
def naive(model, prompt, choice, end=False):
    """A forward over the whole sequence, all logits."""
    start = encode_prompt(TOKENIZER, prompt)
    ending = [VOCABULARY[c] for c in choice] + [2] * end
    log_p = model(torch.tensor([start + ending]), use_cache=False).logits[0].log_softmax(-1)
    return float(sum(log_p[len(start) + i - 1, token] for i, token in enumerate(ending)))


def naive_scores(model, prefix=PREFIX, end=False, count=None):
    pairs = list(zip(QUESTIONS, CHOICES, strict=True))[:count]
    return [[naive(model, prefix + q, c, end) for c in options] for q, options in pairs]


def worst(scores, expected):
    """Largest relative difference; the scores come as float32."""
    assert [len(row) for row in scores] == [len(row) for row in expected]
    pairs = zip(torch.cat(scores).tolist(), [x for row in expected for x in row], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.parametrize(("family", "attention", "changes"), CASES, ids=lambda value: str(value or ""))
def test_scores_equal_a_forward_per_choice(family, attention, changes):
    model = exact_model(family, attention, **changes)
    assert packing_refusal(model) is None
    expected = naive_scores(model)
    assert torch.tensor([x for row in expected for x in row]).std() > 1.0
    for max_tokens in (256, 20, 1):
        assert (
            worst(
                score_choices(model, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=PREFIX, max_tokens=max_tokens),
                expected,
            )
            <= 2e-7
        )


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_without_a_prefix_and_with_an_end(prefix, end):
    model = exact_model("gemma3", "sdpa")
    scores = score_choices(model, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=prefix, end=end)
    assert all((row.dtype, row.device.type, row.requires_grad) == (torch.float32, "cpu", False) for row in scores)
    assert worst(scores, naive_scores(model, prefix, end)) <= 2e-7


def test_one_question_and_none():
    model = exact_model("llama")
    (scores,) = score_choices(model, TOKENIZER, ["abc"], [["x", "yy"]])
    assert scores.tolist() == pytest.approx([naive(model, "abc", "x"), naive(model, "abc", "yy")], rel=2e-7)
    # a prompt that is the beginning of another, and a prompt twice
    twice = score_choices(model, TOKENIZER, ["abc", "ab", "abc"], [["x"], ["x"], ["yy"]])
    assert twice[1].item() == pytest.approx(naive(model, "ab", "x"), rel=2e-7)
    assert torch.cat((twice[0], twice[2])).tolist() == pytest.approx(scores.tolist(), rel=2e-7)
    assert score_choices(model, TOKENIZER, [], []) == []


def test_a_patched_model_scores_with_its_adapter():
    model = exact_model("llama")
    base = naive_scores(model)
    handle = lf.patch(model, lf.LofitConfig(offset=[(0, 1), (2, 3)], scale=[(1, 0)]))
    randomize(handle, std=1.0)
    expected = naive_scores(model)
    assert abs(expected[0][0] - base[0][0]) > 1e-2
    assert worst(score_choices(model, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=PREFIX), expected) <= 2e-7
    assert all(layer.here.kept is None for layer in handle.layers.values())


def test_every_distinct_token_runs_once(monkeypatch):
    model, calls = exact_model("llama"), []
    forward = model.forward

    def counting(**inputs):
        out = forward(**inputs)
        calls.append((inputs["input_ids"].shape[1], len(out.logits.flatten(0, -2))))
        return out

    with remembering():
        assert packing_refusal(model) is None
        monkeypatch.setattr(model, "forward", counting)
        score_choices(model, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=PREFIX)
    shared = 1 + len(PREFIX)
    questions = sum(map(len, QUESTIONS))
    # of " yes", " y", "no", " yes, sir": " yes, si" and "n"; none; "x" and "zzzz"; "b"
    assert calls[0] == (shared, 1)
    assert calls[1][0] == questions + (8 + 1) + 0 + (1 + 4) + 1
    # logits after the last token of each question, and after each of those above: all of them go on
    assert calls[1][1] == len(QUESTIONS) + (8 + 1) + 0 + (1 + 4) + 1
    assert len(calls) == 2


def test_forwards_stay_within_their_budgets(monkeypatch):
    model, sizes = exact_model("llama"), []
    forward = model.forward

    def counting(**inputs):
        sizes.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    expected = naive_scores(model)
    monkeypatch.setattr(model, "forward", counting)
    score_choices(model, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=PREFIX, max_tokens=24)
    assert max(sizes[1:]) <= 24
    # logits for two rows of 97 float64 at a time: a choice of more tokens runs alone
    monkeypatch.setattr(scoring, "_LOGIT_BYTES", 2 * 97 * 8)
    sizes.clear()
    assert worst(score_choices(model, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=PREFIX), expected) <= 2e-7
    assert len(sizes) > 6


def test_prompts_are_tokenized_whole():
    """A tokenizer that merges over the end of the prefix: its joint tokens count."""

    class Merging:
        bos_token, eos_token, bos_token_id, eos_token_id, pad_token_id = None, "</s>", None, 2, 0

        def __call__(self, text, add_special_tokens=True):
            ids, i = [], 0
            while i < len(text):
                double = text[i : i + 2] == "ab"
                ids.append(3 if double else VOCABULARY[text[i]])
                i += 1 + double
            return {"input_ids": ids}

    model, tokenizer = exact_model("llama"), Merging()
    scores = score_choices(model, tokenizer, ["b?", "c?"], [["x"], ["x"]], shared_prefix="so a")
    ids = tokenizer("so ab?")["input_ids"]
    assert len(ids) == 5
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[VOCABULARY["x"]]
    assert scores[0].item() == pytest.approx(expected.item(), rel=2e-7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config: setattr(config, "model_type", "mamba"), "mamba"),
        (lambda config: setattr(config, "_attn_implementation", "flash_attention_2"), "flash_attention_2"),
        (lambda config: setattr(config, "use_bidirectional_attention", True), "bidirectional"),
        (lambda config: config.rope_parameters.update(rope_type="dynamic"), "rotary"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_a_reason(llama, change, reason):
    assert packing_refusal(llama) is None
    change(llama.config)
    assert reason in packing_refusal(llama)


def test_refused_models_are_scored_a_forward_per_choice(monkeypatch, caplog):
    model = exact_model("gemma3", "sdpa")
    expected = naive_scores(model)
    monkeypatch.setattr(scoring, "packing_refusal", lambda model: "of a test")
    assert worst(score_choices(model, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=PREFIX), expected) <= 2e-7
    assert "of a test" in caplog.text


def test_wrong_input_is_refused(llama):
    for questions, choices, message in (
        (["a"], [], "0 for 1"),
        (["a"], [[]], "list of choices"),
        (["a"], ["b"], "list of choices"),
        (["a"], [["b", ""]], "no tokens"),
        (["a" * 60], [["b" * 5]], "context of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            score_choices(llama, TOKENIZER, questions, choices)
    with pytest.raises(ValueError, match="max_tokens"):
        score_choices(llama, TOKENIZER, ["a"], [["b"]], max_tokens=0)


def test_the_prefix_is_left_as_it_is(llama):
    """A cache that a forward had added to would show in the next one."""
    first = score_choices(llama, TOKENIZER, QUESTIONS, CHOICES, shared_prefix=PREFIX, max_tokens=1)
    again = score_choices(llama, TOKENIZER, QUESTIONS[::-1], CHOICES[::-1], shared_prefix=PREFIX, max_tokens=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again[::-1], strict=True))
    # and the model's own cache is another matter
    assert llama(tokens()).logits.shape[1] == 11


def test_mc1_and_mc2():
    scores = [torch.log(torch.tensor([0.2, 0.1, 0.3])), torch.log(torch.tensor([0.4, 0.4, 0.1]))]
    assert mc1(scores, [[0], [0, 2]]) == 0.0
    assert mc1(scores, [[0, 2], [2]]) == 0.5
    assert mc2(scores, [[0, 1], [2]]) == pytest.approx((0.5 + 0.1 / 0.9) / 2)
    # sums of log-probabilities whose exponentials are all 0 in float32
    assert mc2([torch.tensor([-1000.0, -1000.0])], [[0]]) == pytest.approx(0.5)
    for correct, message in (([[0]], "1 for 2"), ([[], [0]], "no correct"), ([[3], [0]], "3 choices")):
        with pytest.raises(ValueError, match=message):
            mc1(scores, correct)
    with pytest.raises(ValueError, match="at least one"):
        mc2([], [])


class Everything:
    """A table in which every family has a row."""

    def __contains__(self, name):
        return True


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        ("cohere2", True),
        ("gpt_oss", True),
        ("deepseek_v3", True),
        ("qwen3_moe", True),
        ("qwen3_5", False),
        ("llama4", False),
        ("jamba", False),
        ("minimax", False),
        ("recurrent_gemma", False),
    ],
)
def test_families_that_a_table_gains_are_tried_first(family, packed, monkeypatch, caplog):
    model = family_model(family)
    monkeypatch.setattr(scoring, "ARCHITECTURES", Everything())
    # one question with choices of which some begin others, and one with a single choice
    expected = naive_scores(model, count=2)
    got = score_choices(model, TOKENIZER, QUESTIONS[:2], CHOICES[:2], shared_prefix=PREFIX)
    assert worst(got, expected) <= 1e-4
    assert ("scoring takes a forward per choice" in caplog.text) is not packed


def test_choices_under_a_head_without_a_weight():
    model = tiny_model("llama")
    dense = score_choices(model, TOKENIZER, ["abc"], [["x", "yy"]])
    model.lm_head = AwqLike(model.lm_head)
    (packed,) = score_choices(model, TOKENIZER, ["abc"], [["x", "yy"]])
    assert packed == pytest.approx(dense[0], rel=0.1)
