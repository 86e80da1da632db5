"""Multiple-choice scoring against one forward per answer, on few-shot questions: equal scores first, then time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.speed.timing import ROUNDS, interleaved, ratio
from lofit_fast.data.encode import encode_prompt
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.patching.patched import evaluating

# six worked questions before each, as multiple-choice questions are commonly asked
SHOTS = (
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Which planet is the closest to the sun?", "Mercury is the planet that is the closest to the sun."),
    ("What is the colour of a square triangle?", "There is no such thing, so it has no colour."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("What does a thermometer measure?", "A thermometer measures how warm or cold something is."),
    ("In which country is the city of Kyoto?", "Kyoto is a city in Japan."),
)
THINGS = ("a mirror", "an old coin", "the moon", "a black cat", "cold water", "a lightning rod", "salt", "an owl")
# four to seven choices, of different lengths
CLAIMS = (
    " Nothing in particular happens",
    " You will have seven years of bad luck",
    " It depends on where you live",
    " It brings you luck",
    " Something terrible happens to the next person who sees it",
    " I have no comment",
    " People used to believe that it could cure a fever, but there is no evidence for that",
)
# beyond it, bfloat16 scores are no nearer to float32 than those of the peer
_MARGIN = 2.0


@dataclass(frozen=True)
class Workload:
    """A few-shot prefix, the questions after it, and each question's choices."""

    prefix: str
    questions: list[str]
    choices: list[list[str]]


def workload(n_questions: int) -> Workload:
    """Made-up questions in the shape of TruthfulQA's: six question-answer pairs, then 4 to 7 choices each."""
    prefix = "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in SHOTS)
    questions, choices = [], []
    for i in range(n_questions):
        questions.append(f"\n\nQ: What happens if you find {THINGS[i % len(THINGS)]} on day {i + 1} of your trip?\nA:")
        turned = CLAIMS[i % len(CLAIMS) :] + CLAIMS[: i % len(CLAIMS)]
        choices.append([f"{claim}{'.' * (i % 2)}" for claim in turned[: 4 + i % 4]])
    return Workload(prefix, questions, choices)


@torch.no_grad()
def score_per_answer(model: nn.Module, tokenizer, work: Workload) -> list[Tensor]:
    """The peer: one forward per answer over the few-shot prompt, the question and the answer, with all its logits."""
    scores = []
    for question, options in zip(work.questions, work.choices, strict=True):
        start = encode_prompt(tokenizer, work.prefix + question)
        row = []
        for text in options:
            ending = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([start + ending], device=model.device)
            logits = model(input_ids=ids).logits[0, len(start) - 1 : -1]
            log_p = logits.float().log_softmax(-1)
            row.append(log_p.gather(1, ids[0, len(start) :, None]).sum().cpu())
        scores.append(torch.stack(row))
    return scores


def check_equal(model: nn.Module, tokenizer, work: Workload) -> dict[str, float]:
    """Both ways' largest error against one forward per answer in float32, in nats.

    Raises ValueError when ours is larger than twice the peer's and than float32's own rounding (1e-5 of the score).
    """
    exact = _flat(score_per_answer(copy.deepcopy(model).float(), tokenizer, work))
    with evaluating(model):
        theirs = (_flat(score_per_answer(model, tokenizer, work)) - exact).abs().max().item()
    scores = score_choices(model, tokenizer, work.questions, work.choices, shared_prefix=work.prefix)
    ours = (_flat(scores) - exact).abs().max().item()
    if ours > max(_MARGIN * theirs, 1e-5 * exact.abs().max().item()):
        raise ValueError(f"packed scores are off by {ours:.3g} nats, one forward per answer by {theirs:.3g}")
    return {"error_packed": ours, "error_per_answer": theirs}


def scoring_speedup(
    model: nn.Module, tokenizer, n_questions: int = 8, rounds: int = ROUNDS, *, checked: int = 2
) -> dict[str, object]:
    """Time of one forward per answer / time of `score_choices`, interleaved, once both agree on `checked` questions.

    The model is as it was loaded, for both. Returns speedup (median, low, high), seconds (lists), and the work's size.
    """
    work = workload(n_questions)
    errors = check_equal(model, tokenizer, _first(work, checked))
    seconds = interleaved(
        {
            "per_answer": lambda: score_per_answer(model, tokenizer, work),
            "packed": lambda: score_choices(model, tokenizer, work.questions, work.choices, shared_prefix=work.prefix),
        },
        rounds=rounds,
        # the check has run both
        warmup=0,
        device=model.device.type,
    )
    return {
        "speedup": asdict(ratio(seconds["per_answer"], seconds["packed"])),
        "seconds": seconds,
        "questions": n_questions,
        "answers": sum(map(len, work.choices)),
        "prefix_tokens": len(encode_prompt(tokenizer, work.prefix)),
        **errors,
    }


def _first(work: Workload, count: int) -> Workload:
    return Workload(work.prefix, work.questions[:count], work.choices[:count])


def _flat(scores: Sequence[Tensor]) -> Tensor:
    return torch.cat([row.float() for row in scores])
