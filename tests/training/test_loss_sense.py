"""What a loss says about a training, in a line each."""

import math

import pytest

from lofit_fast.training.loss_sense import LossSense

GUESS = math.log(100)


def said(*epochs, chance=GUESS, stage="tune", of=None):
    """The lines of a step with these losses of its steps, epoch by epoch. of: how many epochs it has."""
    lines = []
    sense = LossSense(stage, chance, of or len(epochs), lines.append)
    rows = [{"epoch": n, "loss": sum(steps) / len(steps), "step_losses": steps} for n, steps in enumerate(epochs, 1)]
    for row in rows:
        sense.saw(row, rows[0])
    return lines


def test_nothing_is_said_of_a_loss_that_falls():
    assert said([3.0, 2.5], [2.0, 1.5]) == []
    assert said([3.0, 2.5, 2.0, 1.0]) == []


def test_a_loss_of_a_guess_is_said_once():
    lines = said([4.7, 4.6], [4.6, 4.6], [4.7, 4.7])
    assert len(lines) == 1
    assert "'tune' is 4.650 in epoch 1" in lines[0] and "guess is 4.605" in lines[0]


@pytest.mark.parametrize("epochs", [([2.0, 2.1], [2.0, 2.0]), ([2.0, 1.0, 2.5, 2.5],)])
def test_a_loss_that_does_not_fall_is_said_at_the_end(epochs):
    (line,) = said(*epochs)
    assert "not below the 2.000 that it began with" in line
    # not before
    assert said(*epochs, of=9) == []


def test_where_nobody_knows_a_guess_nothing_is_said_of_it():
    assert said([9.0, 8.0], chance=None) == []
