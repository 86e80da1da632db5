"""How good a model is: greedy answers, scored choices, log-probabilities."""
