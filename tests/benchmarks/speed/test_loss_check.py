"""The check before the clock: what is right passes whatever the luck of its rounding, what is wrong does not."""

from itertools import product

import pytest
import torch

from benchmarks.peers.peer import AS_RUN, SAME_ENGINE
from benchmarks.speed.step import loss_check
from benchmarks.speed.step.loss_check import FAULT, Checks, references
from benchmarks.speed.step.rows import Row, live
from benchmarks.speed.step.workload import workload
from lofit_fast.training.engine import Engine
from lofit_kernels.error_bound import bound_of
from tests.ordinary_sample import some_now
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import word_tokenizer

ENGINE = Engine(attention="eager", compile=False, packing=False)
STEPS = ("step 1", "step 2")
RIGHT = (("hook", AS_RUN), ("hook", SAME_ENGINE), ("ours", SAME_ENGINE), ("original", AS_RUN))


@pytest.fixture(scope="module")
def work():
    return workload(word_tokenizer(), None, 16)


def tiny(dtype, seed):
    return tiny_model("llama", dtype, seed, max_position_embeddings=512, initializer_range=0.2)


def checked(base, work, row, reference, planted=1.0):
    """The check of a row. planted: what the peer multiplies the vectors it is given with."""
    checks = Checks(base, work, reference)
    checks.large = {key: (heads, planted * rows) for key, (heads, rows) in checks.large.items()}
    with live(base, row, ENGINE) as one:
        return checks(one)


# slow: as many draws as show that no luck is in it
@pytest.mark.parametrize(
    "dtype, seed",
    some_now(list(product([torch.float32, torch.bfloat16], range(4))), (torch.float32, 0), (torch.bfloat16, 1)),
    ids=str,
)
def test_a_right_peer_passes_and_a_wrong_one_does_not(work, dtype, seed):
    base = tiny(dtype, seed)
    for step, reference in references(base, work, STEPS).items():
        for name, setting in RIGHT:
            check = checked(base, work, Row(name, setting, step), reference)
            assert check.ok, (name, setting, step, check)
        if dtype == torch.float32:
            # a fault of 1 % is beyond the rounding of the right and of the wrong
            assert reference.fault > 2 * reference.tolerance
            for planted in (1 + FAULT, 1 - FAULT):
                assert not checked(base, work, Row("hook", AS_RUN, step), reference, planted).ok
        assert not checked(base, work, Row("hook", AS_RUN, step), reference, 0.0).ok


def test_errors_that_cancel_in_the_loss_count(work, monkeypatch):
    base, rows = tiny(torch.float32, 0), loss_check.rows_of(work)
    right = loss_check.token_losses(base, rows, work.pad, {})

    def lucky(model, chosen, pad, values):
        # every token off by a thousandth, up and down in turns
        return [torch.full_like(losses, 1e-3 * (-1) ** n) + losses for n, losses in enumerate(right[: len(chosen)])]

    monkeypatch.setattr(loss_check, "token_losses", lucky)
    error = loss_check.own_error(base, torch.cat(right), rows, work.pad, {})
    assert error >= 0.99e-3


def test_the_accuracy_rule_is_twice_eagers_error_or_one_unit_in_the_last_place():
    assert bound_of(0.25, 1.0, torch.float32) == 0.5
    assert bound_of(0.0, 7.3, torch.bfloat16) == 2.0**-7 * 4
    assert bound_of(0.0, 0.0, torch.float32) == 0.0
