"""DPO's loss and what is watched of it, as tensors: nothing is read from the device until it is logged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# of a batch of TRL's collator what the model is not called with
NOT_THE_MODELS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


def dpo_loss(outputs, inputs: Mapping[str, Tensor], beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """-log sigmoid(beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected))), mean over a batch.

    outputs: of a model with TRL's output head: log_probs, entropy, mean_logits, is_top1, each (2 B, S - 1), the chosen
    answers first. inputs: a batch of TRL's collator. arXiv:2305.18290, equation 7.
    Returns a scalar, and by TRL's names what TRL logs, each a scalar.
    """
    mask = inputs["completion_mask"][:, 1:]
    log_probs = outputs.log_probs[:, -mask.shape[1] :].sum(1)
    chosen, rejected = log_probs.chunk(2)
    better, worse = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
    loss = -nn.functional.logsigmoid(beta * (better - worse)).mean()
    with torch.no_grad():
        rewards = beta * better.detach(), beta * worse.detach()
        watched = {
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/accuracies": (rewards[0] > rewards[1]).float().mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(),
            "logps/chosen": chosen.detach().mean(),
            "logps/rejected": rejected.detach().mean(),
        }
        return loss, watched | _of_tokens(outputs, mask)


def _of_tokens(outputs, mask: Tensor) -> dict[str, Tensor]:
    """Means over the answers' tokens. mask: (2 B, S - 1)."""
    entropy, logits, top = (
        getattr(outputs, name)[:, -mask.shape[1] :] * mask for name in ("entropy", "mean_logits", "is_top1")
    )
    halves = [each.chunk(2) for each in (mask, logits, top)]
    # an answer may have no tokens
    chosen, rejected = (half.sum().clamp(min=1) for half in halves[0])
    return {
        "entropy": entropy.sum() / mask.sum().clamp(min=1),
        "logits/chosen": halves[1][0].sum() / chosen,
        "logits/rejected": halves[1][1].sum() / rejected,
        "mean_token_accuracy": halves[2][0].sum() / chosen,
    }
