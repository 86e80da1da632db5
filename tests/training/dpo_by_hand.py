"""The loss of DPO (arXiv:2305.18290), one answer at a time."""

import torch
from torch import nn


def dpo_loss(preferences, draws, beta, log_p, base_log_p):
    """-log sigmoid(beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(drawn))), a mean over the preferences.

    draws: for each preference which of its rejected answers. log_p, base_log_p: (preference, answer) -> log p.
    """
    margins = []
    for preference, drawn in zip(preferences, draws, strict=True):
        pair = (preference.chosen, preference.rejected[drawn])
        with torch.no_grad():
            base = [base_log_p(preference, answer) for answer in pair]
        ratios = [log_p(preference, answer) - b for answer, b in zip(pair, base, strict=True)]
        margins.append(ratios[0] - ratios[1])
    return -nn.functional.logsigmoid(beta * torch.stack(margins)).mean()
