"""A dry run says what a training would do, and does none of it."""

import json
from dataclasses import asdict

import pytest

import lofit_fast as lf
from lofit_fast.data.preview import marked
from lofit_fast.tasks.task import Preference
from lofit_fast.training.dry_run import Refused, dry_run
from lofit_fast.training.objectives import Completions, Preferences
from lofit_fast.training.run_folder import RunFolder
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, HELD_OUT, QUICK, assert_same_state, fit, state_of

TOKENIZER = tiny_tokenizer()
PAIRS = [Preference(f"{a}?", f" {a}", (f" {a}{a}", " no")) for a in "abcd"]


def test_completions_are_counted_and_shown():
    model = tiny_model("llama")
    before = state_of(model)
    found = dry_run(model, TOKENIZER, Completions(EXAMPLES, HELD_OUT), QUICK)
    assert_same_state(model, before)
    assert lf.handle_of(model) is None
    assert (found.objective, found.examples, found.validation) == ("completions", 12, 2)
    # <s>a+m= and ma</s>
    assert (found.tokens, found.learned_tokens, found.longest, found.limit) == (12 * 8, 12 * 3, 8, 64)
    assert (found.truncated, found.refused, found.recipe) == (0, [], asdict(QUICK))
    assert [(s.example, s.role, marked(s.parts)) for s in found.shown] == [
        (number, "completion", f"<s>{row['prompt']}[[{row['completion']}</s>]]")
        for number, row in enumerate(EXAMPLES[:3], start=1)
    ]
    json.dumps(found.as_dict())


def test_the_engine_is_the_one_that_a_run_has(tmp_path):
    model = tiny_model("llama")
    engine = lf.Engine(packing=False, prefix_cache_gb=0.5)
    found = dry_run(model, TOKENIZER, Completions(EXAMPLES), QUICK, engine=engine)
    fit(model, tmp_path / "run", engine=engine)
    run = RunFolder(tmp_path / "run")
    assert found.engine == {stage: run.engine(stage) for stage in ("select", "tune")}


def test_given_heads_leave_one_step():
    assert dry_run(tiny_model("llama"), TOKENIZER, Completions(EXAMPLES), QUICK, heads=[(0, 1)]).engine.keys() == {
        "tune"
    }


def test_preferences_show_both_answers():
    pytest.importorskip("trl")
    found = dry_run(tiny_model("llama"), TOKENIZER, Preferences(PAIRS), QUICK, validation=5, show=1)
    assert (found.objective, found.examples, found.validation) == ("preferences", 4, 5)
    assert [(s.role, marked(s.parts)) for s in found.shown] == [
        ("chosen", "<s>a?[[ a</s>]]"),
        ("rejected", "<s>a?[[ aa</s>]]"),
    ]
    assert found.learned_tokens == 4 * (3 + 4)


LONG = "x" * 80


@pytest.mark.parametrize(
    ("objective", "refused", "counts"),
    [
        (
            Completions(
                [EXAMPLES[0], {"prompt": LONG, "completion": "y"}, {"prompt": "p"}], [{**HELD_OUT[0], "prompt": LONG}]
            ),
            [
                (2, "completion", "83 tokens long, the limit is 64"),
                (3, "completion", ", got ['prompt']"),
                (1, "validation", "84 tokens long"),
            ],
            (3, 1),
        ),
        (
            Preferences([*PAIRS, Preference("p", LONG, ("r", f"r{LONG}"))]),
            [(5, "chosen", "83 tokens"), (5, "rejected", "84 tokens")],
            (5, 0),
        ),
        (
            Completions(
                [EXAMPLES[0], {"prompt": 3, "completion": "y"}, {"prompt": "p", "completion": None}],
                [{**HELD_OUT[0], "prompt": 4.0}],
            ),
            [
                (2, "completion", "prompt must be a string, got int"),
                (3, "completion", "completion must be a string, got NoneType"),
                (1, "validation", "prompt must be a string, got float"),
            ],
            (3, 1),
        ),
        (
            Preferences([*PAIRS, {"prompt": 3, "chosen": "a", "rejected": "b"}, {"prompt": "p"}]),
            [(5, "preference", "prompt must be a string, got int"), (6, "preference", "got the keys ['prompt']")],
            (6, 0),
        ),
    ],
    ids=["completions", "preferences", "completions that are no text", "preferences that are none"],
)
def test_all_that_is_refused_is_listed(objective, refused, counts):
    pytest.importorskip("trl")
    model = tiny_model("llama")
    before = state_of(model)
    found = dry_run(model, TOKENIZER, objective, QUICK)
    assert_same_state(model, before)
    assert [(r.example, r.role) for r in found.refused] == [(number, role) for number, role, _ in refused]
    assert all(reason in r.reason for r, (_, _, reason) in zip(found.refused, refused, strict=True))
    assert isinstance(found.refused[0], Refused)
    assert (found.examples, found.validation, found.engine) == (*counts, {})
    assert found.shown and found.longest < found.limit


@pytest.mark.parametrize("kind", [list, iter], ids=["a list", "a generator"])
def test_rows_that_can_be_read_once_are_listed_too(kind):
    rows = [EXAMPLES[0], {"prompt": LONG, "completion": "y"}, {"prompt": 3, "completion": "y"}]
    found = dry_run(tiny_model("llama"), TOKENIZER, Completions(kind(rows), kind(HELD_OUT)), QUICK)
    assert [(r.example, r.role) for r in found.refused] == [(2, "completion"), (3, "completion")]
    assert (found.examples, found.validation) == (3, len(HELD_OUT))


@pytest.mark.parametrize(
    ("given", "message"), [({"tokenizer": None}, "the model's tokenizer"), ({"model": "llama"}, "expected a model")]
)
def test_what_is_no_model_or_tokenizer_is_not_laid_to_the_texts(given, message):
    how = {"model": tiny_model("llama"), "tokenizer": TOKENIZER, **given}
    with pytest.raises(TypeError, match=message):
        dry_run(**how, objective=Completions([{"prompt": 3, "completion": "y"}]), recipe=QUICK)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (Completions([]), {}, "the training data is empty"),
        (Completions(EXAMPLES), {"recipe": lf.Recipe(top=99)}, "asked for the top 99 heads, but the model has 12"),
        (Completions(EXAMPLES), {"heads": [(9, 0)]}, "9"),
        (Preferences(PAIRS), {"engine": lf.Engine(packing=True)}, "packing=True was asked for"),
    ],
)
def test_what_fit_refuses_is_refused_with_the_same_sentence(objective, options, message):
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match=message):
        dry_run(tiny_model("llama"), TOKENIZER, objective, **{"recipe": QUICK, **options})


def test_a_patched_model_is_refused():
    model = tiny_model("llama")
    lf.patch(model, lf.LofitConfig(offset="all"))
    with pytest.raises(ValueError, match="already patched"):
        dry_run(model, TOKENIZER, Completions(EXAMPLES), QUICK)
