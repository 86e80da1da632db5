"""Generation with a method in the model: 16 prompts at a time, 16 tokens each, by the model's own `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict

from torch import Tensor, nn

from benchmarks.peers.peer import AS_RUN, SAME_ENGINE
from benchmarks.speed.step.rows import Live, Row, live
from benchmarks.speed.step.steps import vectors
from benchmarks.speed.timing import interleaved, ratio
from lofit_fast.data.encode import encode_prompt, pad_token_id
from lofit_fast.data.padding import padded
from lofit_fast.patching.patched import evaluating
from lofit_fast.training.engine import Engine

# the others as their users run them: hooks or PEFT around a frozen model, and nothing else
ROWS = (Row("ours", SAME_ENGINE, "step 2"), Row("hook", AS_RUN, "step 2"), Row("lora_all", AS_RUN))
PROMPTS, TOKENS = 16, 16
# of the first tokens, those that rounding may turn
_MAY_DIFFER = 0.25
# of the vectors: enough to turn first tokens. LoRA, whose B is zero, answers as the base does
_LARGE = 3.0


def generation_seconds(
    base: nn.Module, tokenizer, prompts: Sequence[str], *, rounds: int, engine: Engine | None = None
) -> dict:
    """Seconds per round of every row, once ours and the hook begin their answers alike, and otherwise than the base.

    prompts: one batch. Raises ValueError when more than a quarter of ours and the hook's first tokens differ, or none
    from the base's although the vectors are large.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    device = next(base.parameters()).device
    ids, mask = (x.to(device) for x in padded(encoded, pad_token_id(tokenizer), side="left"))
    batch = {"input_ids": ids, "attention_mask": mask}
    with ExitStack() as scopes:
        lives = {row.peer: scopes.enter_context(live(base, row, engine or Engine())) for row in ROWS}
        runs = {name: prompt_run(one, batch) for name, one in lives.items()}
        for name in ("ours", "hook"):
            lives[name].attached.assign(vectors(base, "step 2", std=_LARGE))
        ours, hook, plain = (run()[:, ids.shape[1]] for run in (runs["ours"], runs["hook"], runs["lora_all"]))
        if (apart := (ours != hook).double().mean().item()) > _MAY_DIFFER:
            raise ValueError(f"{apart:.0%} of the answers begin with another token than the hook's")
        if (hook == plain).all():
            raise ValueError("the answers begin as the base's do, whatever the vectors: nothing is compared")
        seconds = interleaved(runs, rounds=rounds, warmup=0, device=batch["input_ids"].device.type)
    rows = [{"peer": row.peer, "setting": row.setting, "step": row.step, "seconds": seconds[row.peer]} for row in ROWS]
    against = {name: asdict(ratio(seconds[name], seconds["ours"])) for name in ("hook", "lora_all")}
    return {"rows": rows, "against_ours": against, "prompts": len(prompts), "new_tokens": TOKENS}


def prompt_run(one: Live, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    model = one.attached.model.eval()

    def run() -> Tensor:
        # what models are published with (sampling, penalties) is of no use to a greedy answer, and says so
        with (
            warnings.catch_warnings(action="ignore"),
            evaluating(model) if one.row.peer == "ours" else nullcontext(),
        ):
            return model.generate(**batch, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)

    return run
