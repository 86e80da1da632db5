"""What the peers' tests share: contrasts, a wide enough random edit, a batch with a prompt, and logits in float64."""

import torch

from lofit_fast.data.encode import IGNORED
from lofit_fast.tasks.contrast import Contrast
from tests.tiny_models import tokens

CONTRASTS = [Contrast(f"is {n} odd? ", "yes" if n % 2 else "no", "no" if n % 2 else "yes") for n in range(12)]


@torch.no_grad()
def shake(attachment, std: float = 0.3, seed: int = 7) -> None:
    """Parameters far from their start, so that a missing edit shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in attachment.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def logits(model, **given) -> torch.Tensor:
    """Of two rows of tokens, or of what is given."""
    with torch.no_grad():
        return model(**({"input_ids": tokens()} | given), use_cache=False).logits


def right_padded(prompts: tuple[int, ...], answers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A batch of prompts and labelled answers of these lengths, as full batches have it: every logit is computed."""
    width = max(p + a for p, a in zip(prompts, answers, strict=True))
    ids = tokens(len(prompts), width)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        mask[row, : prompt + answer] = 1
        labels[row, prompt : prompt + answer] = ids[row, prompt : prompt + answer]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
