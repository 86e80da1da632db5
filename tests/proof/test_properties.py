"""Random models and operations: a patched model is the hook's or the base's. `make properties` tries thousands."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings

from tests.proof.drawn_stories import stories
from tests.proof.stories import OPERATIONS, Setting, Story, tell

# the same stories in every run: what fails here fails everywhere
FEW = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@FEW
@given(stories())
def test_a_model_is_always_the_hooks_or_the_bases(story):
    tell(*story)


def test_a_story_that_goes_wrong_is_noticed(tmp_path):
    # a vector that moves behind the hook's back
    story = Story(Setting("llama", torch.float32), tmp_path)
    OPERATIONS["patch"](story, "all", [(1, 2)], 0)
    story.check()
    with torch.no_grad():
        wrong = story.logits(story.model) * 1.001
    with pytest.raises(AssertionError, match="from the hook"):
        story.check(wrong)
    OPERATIONS["unpatch"](story)
    with pytest.raises(AssertionError, match="not the base"):
        story.check(wrong)


def test_every_operation_has_sense_somewhere(tmp_path):
    told = [("patch", "all", None, 0), ("patch", "all", None, 0), ("train", 1), ("save",), ("disable",), ("fold",)]
    told += [("generate",), ("export",), ("unpatch",), ("load", 0), ("merge",), ("unpatch",)]
    assert {name for name, *_ in told} == set(OPERATIONS)
    tell(Setting("llama", torch.float32), told)
