"""Generation with a method in the model: 16 prompts at a time, 16 tokens each, by the model's own `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn

from benchmarks.providers import AS_RUN, SAME_ENGINE
from benchmarks.settings import Live, Row, live
from benchmarks.timing import interleaved, ratio
from lofit_fast.encoding import encode_prompt, pad_token_id
from lofit_fast.patch import evaluating
from lofit_fast.training.engine import Engine

# the others as their users run them: hooks or PEFT around a frozen model, and nothing else
ROWS = (Row("ours", SAME_ENGINE, "step 2"), Row("hook", AS_RUN, "step 2"), Row("lora_all", AS_RUN))
PROMPTS, TOKENS = 16, 16
# of the first tokens, those that rounding may turn
_MAY_DIFFER = 0.25


def measure(base: nn.Module, tokenizer, prompts: Sequence[str], *, rounds: int, engine: Engine | None = None) -> dict:
    """Seconds per round of every row, and hook / ours as `speedup`, once ours and the hook begin their answers alike.

    prompts: one batch. Raises ValueError when more than a quarter of ours and the hook's first tokens differ.
    """
    batch = _left_padded(tokenizer, prompts, next(base.parameters()).device)
    with ExitStack() as scopes:
        runs = {row.provider: _run(scopes.enter_context(live(base, row, engine or Engine())), batch) for row in ROWS}
        first = {name: runs[name]()[:, batch["input_ids"].shape[1]] for name in ("ours", "hook")}
        apart = (first["ours"] != first["hook"]).double().mean().item()
        if apart > _MAY_DIFFER:
            raise ValueError(f"{apart:.0%} of the answers begin with another token than the hook's")
        seconds = interleaved(runs, rounds=rounds, warmup=0, device=batch["input_ids"].device.type)
    rows = [
        {"provider": row.provider, "setting": row.setting, "step": row.step, "seconds": seconds[row.provider]}
        for row in ROWS
    ]
    return {
        "rows": rows,
        "speedup": asdict(ratio(seconds["hook"], seconds["ours"])),
        "prompts": len(prompts),
        "new_tokens": TOKENS,
        "other_first_tokens": apart,
    }


def _run(one: Live, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    model = one.attached.model.eval()

    def run() -> Tensor:
        # what models are published with (sampling, penalties) is of no use to a greedy answer, and says so
        with (
            warnings.catch_warnings(action="ignore"),
            evaluating(model) if one.row.provider == "ours" else nullcontext(),
        ):
            return model.generate(**batch, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)

    return run


def _left_padded(tokenizer, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    width, pad = max(map(len, rows)), pad_token_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
