"""Judging a model on a task: greedy answers and exact match, and the best-scoring of a closed set of answers."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lofit_fast.config import shown
from lofit_fast.data.decode import continuation, decoded, special_tokens
from lofit_fast.data.encode import (
    BoundaryWarning,
    answer_tokens,
    check_unlike,
    encode_prompt,
    pad_token_id,
    warn_of_boundaries,
)
from lofit_fast.data.lengths import check_count
from lofit_fast.data.padding import padded
from lofit_fast.evaluation.choice_metrics import mc1, mc2
from lofit_fast.evaluation.choices import check_room, choice_tokens, score_choices
from lofit_fast.evaluation.division import Division
from lofit_fast.evaluation.finite_logits import FiniteLogits
from lofit_fast.evaluation.generation_settings import StandingAlone, ends_of
from lofit_fast.evaluation.prompt_batches import prompt_batches
from lofit_fast.evaluation.shared_prompts import SharedPrompts
from lofit_fast.models.vocabulary import check_ids, check_padding
from lofit_fast.patching.cache_names import cache_name
from lofit_fast.patching.patched import evaluating
from lofit_fast.patching.placement import device_of
from lofit_fast.tasks.chat import Conversation, Rendered
from lofit_fast.tasks.task import Example, MultipleChoice, Task, exact_match
from lofit_fast.torch_defaults import on_the_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# the paper's
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Judgement:
    """How a model does on a task.

    metrics: "exact_match", or "mc1" and "mc2", each 0 to 1. hits: per question, in the task's order, 1.0 or 0.0 for
    right or wrong by the first of them, so that two models can be compared question by question.
    """

    metrics: dict[str, float]
    hits: list[float]


def judge(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    batch_size: int | None = None,
    progress: bool = False,
    shared: SharedPrompts | None = None,
) -> Judgement:
    """A task's own metric: MC1 and MC2 of its choices where it has some, exact match on its validation otherwise.

    MC1 asks whether the best answer scores above every wrong one, whatever the other correct ones score; MC2 for the
    share of probability on all correct ones (arXiv:2109.07958). A choice's end is scored where its question's `ends`
    says so. batch_size: how many prompts are continued at a time, by default 32, and fewer where answers would depend
    on it; choices are scored by tokens, and take none.
    shared: for several adapters of one base that act on answers alone, judged one after the other: prompts to be
    continued are then computed once for all of them. Choices are scored without it.
    In a launch of several processes all of them must call it, with the same task: they divide the work by whole
    batches, and each returns all of the result, which is the one that a single process has.
    Raises TypeError for what is no task, ValueError for a task with nothing to be judged by, a batch_size below 1
    or beside choices, a right and a wrong choice of the same tokens, and what `generate_answers` and `score_choices`
    raise.
    """
    if not isinstance(task, Task):
        raise TypeError(f"expected a Task, as load_task makes one of a file, got {type(task).__name__}")
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if task.choices:
        if batch_size is not None:
            raise ValueError(
                f"got batch_size={batch_size}, but the choices of the task {task.name!r} are scored by tokens, not in "
                "batches of prompts: expected None"
            )
        return _judge_choices(model, tokenizer, task, progress)
    _check_any(task.validation)
    warn_of_boundaries(tokenizer, task.validation)
    batches = {} if batch_size is None else {"batch_size": batch_size}
    hits = _hits(
        model,
        tokenizer,
        task.validation,
        max_new_tokens=answer_length(tokenizer, task.validation),
        progress=progress,
        shared=shared,
        **batches,
    )
    return Judgement({"exact_match": sum(hits) / len(hits)}, hits)


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    progress: bool = False,
    shared: SharedPrompts | None = None,
) -> list[str]:
    """Greedy continuations, in the order of the prompts, special tokens left out, each as it reads behind its prompt.

    Batches are of like length and padded on the left, as far as a trial shows that no answer depends on its batch: see
    `prompt_batches`. A patched model runs with its offsets folded. Several processes divide them, see `judge`. Of the
    model's `generation_config` the tokens that end an answer count, and nothing else.
    shared: see `judge`.
    Raises ValueError for a prompt that leaves no room for max_new_tokens in the model's context, for tokens that the
    model has no embedding for, for a batch_size or max_new_tokens below 1, and for shared prompts under vectors that
    act on them; FloatingPointError, naming the prompt, where logits are not finite.
    """
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress, "shared": shared}
    prompts = _listed(prompts)
    rows = _generated(model, tokenizer, prompts, **options)
    pairs = zip(prompts, rows, strict=True)
    return [continuation(tokenizer, encode_prompt(tokenizer, prompt), row) for prompt, row in pairs]


def exact_match_accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **options: Any
) -> float:
    """Share of examples whose greedy answer is one of the correct ones, 0 to 1. options: of `generate_answers`.

    Raises ValueError for no examples, and what `generate_answers` raises.
    """
    examples = list(examples)
    _check_any(examples)
    hits = _hits(model, tokenizer, examples, **options)
    return sum(hits) / len(hits)


def answer_length(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> int:
    """Tokens to generate so that every correct answer fits, at least MAX_NEW_TOKENS."""
    return max([MAX_NEW_TOKENS, *(answer_tokens(tokenizer, example) for example in examples)])


def judged_by(example: Example) -> list[object]:
    """All of an example that `exact_match_accuracy` reads, as plain data."""
    of_chat = [example.marker, example.ending] if isinstance(example, Conversation) else None
    return [isinstance(example.prompt, Rendered), example.prompt, list(example.answers), of_chat]


def score_candidates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    candidates: Sequence[str],
    **options: Any,
) -> Tensor:
    """log p(candidate, end of sequence | prompt), summed over tokens: (prompts, candidates) float32 on the CPU.

    The same candidates for every prompt; see `choices.score_choices` for the options, and for what runs only once.
    The end token is scored too, so that no candidate gains by being the beginning of another.
    Raises TypeError for one text instead of several, ValueError for no candidates, and what `score_choices` raises.
    """
    prompts, candidates = _listed(prompts), _listed(candidates)
    if not candidates:
        raise ValueError("expected candidates to score, got none")
    rows = score_choices(model, tokenizer, prompts, [candidates] * len(prompts), end=True, **options)
    return torch.stack(rows) if rows else torch.zeros(0, len(candidates), dtype=torch.float32)


def constrained_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    candidates: Sequence[str],
    **options: Any,
) -> float:
    """Share of examples whose best-scoring candidate is a correct answer, 0 to 1. options: of `score_candidates`.

    Raises ValueError for no examples, and what `score_candidates` raises.
    """
    examples, candidates = list(examples), _listed(candidates)
    _check_any(examples)
    scores = score_candidates(model, tokenizer, [e.prompt for e in examples], candidates, **options)
    best = [candidates[int(i)] for i in scores.argmax(1)]
    return sum(exact_match(text, e.answers) for text, e in zip(best, examples, strict=True)) / len(examples)


def _judge_choices(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, progress: bool) -> Judgement:
    prompts, choices = [c.prompt for c in task.choices], [c.choices for c in task.choices]
    how = {"shared_prefix": task.shared_prefix, "end": [c.ends for c in task.choices], "progress": progress}
    scores = score_choices(model, tokenizer, prompts, choices, **how)
    for number, (row, c) in enumerate(zip(scores, task.choices, strict=True), start=1):
        _check_told_apart(tokenizer, task.shared_prefix, c, row, f"question {number}")
    # MC1 has one correct choice, the best answer
    listed = [
        row[[c.best, *(i for i in range(len(row)) if i not in c.correct)]]
        for row, c in zip(scores, task.choices, strict=True)
    ]
    hits = [mc1([row], [[0]]) for row in listed]
    metrics = {"mc1": sum(hits) / len(hits), "mc2": mc2(scores, [c.correct for c in task.choices])}
    return Judgement(metrics, hits)


def _check_told_apart(
    tokenizer: PreTrainedTokenizerBase, prefix: str, question: MultipleChoice, scores: Tensor, where: str
) -> None:
    """Raise ValueError for a correct and a wrong choice of the same tokens, which show in their scores."""
    for right in question.correct:
        for wrong in set(range(len(question.choices))) - set(question.correct):
            if scores[right] == scores[wrong]:
                pair = question.choices[right], question.choices[wrong]
                # said of all choices already
                with warnings.catch_warnings(action="ignore", category=BoundaryWarning):
                    _, ((first, second),) = choice_tokens(tokenizer, prefix, [question.prompt], [pair], [question.ends])
                check_unlike(first, second, f"{where}: the choices {pair[0]!r} and {pair[1]!r}")


def _hits(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **options: Any
) -> list[float]:
    """Per example whether the greedy answer is one of the correct ones, 1.0 or 0.0."""
    ends = ends_of(model, tokenizer, {e.ending for e in examples if isinstance(e, Conversation)})
    rows = _generated(model, tokenizer, [example.prompt for example in examples], ends=ends, **options)
    return [float(_is_right(tokenizer, example, row, ends)) for example, row in zip(examples, rows, strict=True)]


def _is_right(tokenizer: PreTrainedTokenizerBase, example: Example, row: list[int], ends: Set[int]) -> bool:
    """Whether a generated row is one of the correct answers: as it reads, or as the tokenizer makes it of the answer.

    An answer may hold special tokens, its end too, or signs that the tokenizer writes in another way.
    """
    return exact_match(_said(tokenizer, example, row), example.answers) or _is_written(tokenizer, example, row, ends)


def _said(tokenizer: PreTrainedTokenizerBase, example: Example, row: list[int]) -> str:
    """The generated text without special tokens; of a turn of a conversation, its content."""
    if not isinstance(example, Conversation):
        return decoded(tokenizer, row)
    content = example.said(decoded(tokenizer, row, special=True))
    for special in special_tokens(tokenizer).values():
        content = content.replace(special, "")
    return content


def _is_written(tokenizer: PreTrainedTokenizerBase, example: Example, row: list[int], ends: Set[int]) -> bool:
    """The same of texts that the tokenizer has read and written, with their special tokens, up to an end."""
    text = decoded(tokenizer, _before_end(row, ends), special=True)
    if isinstance(example, Conversation):
        text = example.said(text)
    written = (_written(tokenizer, answer, ends) for answer in example.answers)
    answers = [answer for answer in written if answer.strip()]
    return bool(answers) and exact_match(text, answers)


def _written(tokenizer: PreTrainedTokenizerBase, answer: str, ends: Set[int]) -> str:
    """An answer as the tokenizer reads and writes it, without the end that closes it; "" where it loses a part."""
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    unknown = tokenizer.unk_token_id in ids and tokenizer.unk_token not in answer
    if unknown or _letters(decoded(tokenizer, ids, special=True)) != _letters(answer):
        return ""
    while ids and ids[-1] in ends:
        ids.pop()
    # what goes on after an end is never written as a whole
    return "" if not ends.isdisjoint(ids) else decoded(tokenizer, ids, special=True)


def _letters(text: str) -> str:
    """A text's visible signs, whatever their case, width and accents."""
    apart = unicodedata.normalize("NFKD", text).casefold()
    return "".join(sign for sign in apart if not sign.isspace() and not unicodedata.combining(sign))


def _before_end(ids: list[int], ends: Set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


@on_the_cpu
@torch.no_grad()
def _generated(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    progress: bool = False,
    ends: Set[int] = frozenset(),
    shared: SharedPrompts | None = None,
) -> list[list[int]]:
    """The greedy continuations' token ids. ends: tokens to stop at; none for the model's own."""
    check_count("batch_size", batch_size)
    check_count("max_new_tokens", max_new_tokens)
    prompts = _listed(prompts)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_ids(model, encoded, "prompt")
    check_padding(model, pad_token_id(tokenizer), encoded)
    check_room(model, encoded, max_new_tokens)
    division = Division(model, "generating")
    division.check_same(encoded, "prompts")
    if shared is not None and division.gathers:
        raise ValueError("shared prompts need a model that is whole in every process: expected shared=None under FSDP")
    answers: dict[int, list[int]] = {}
    greedy = _greedy(tokenizer, max_new_tokens, ends or ends_of(model, tokenizer))
    device = device_of(model)
    pad = pad_token_id(tokenizer)
    with division.together(), evaluating(model):
        batches = prompt_batches(model, [len(row) for row in encoded], batch_size, pad, division)
        for rows, counts in division.batches(batches, progress):
            ids, mask = padded([encoded[i] for i in rows], pad, side="left")
            ids, mask = ids.to(device), mask.to(device)
            given = None if shared is None else shared.cache(model, [encoded[i] for i in rows])
            past = {} if given is None else {cache_name(model): given}
            # every step gathers weights: a process that is done goes on until all are
            synced = {"synced_gpus": True} if division.gathers else {}
            finite = FiniteLogits()
            how = {"generation_config": greedy, "logits_processor": [finite], **synced, **past}
            out = model.generate(input_ids=ids, attention_mask=mask, **how)
            finite.check({row: f"prompt {i + 1} ({shown(prompts[i])})" for row, i in enumerate(rows)})
            if counts:
                answers |= zip(rows, out[:, ids.shape[1] :].tolist(), strict=True)
    answers = division.put_together(answers)
    return [answers[i] for i in range(len(prompts))]


def _listed(texts: Iterable[str]) -> list[str]:
    """Raises TypeError for one text, which would be taken for one per character."""
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, got the one text {shown(texts)}")
    return list(texts)


def _check_any(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("accuracy needs at least one example, got none")


def _greedy(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, ends: Set[int]) -> StandingAlone:
    """Greedy decoding and nothing else. ends: tokens to stop at."""
    return StandingAlone(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=sorted(ends) or None,
    )
