"""How likely a model finds given answers: log-probabilities in which every distinct token runs once.

The prompts' common beginning (a few-shot prefix, say) runs once for all questions and stays as keys and values. What
follows it is a tree per question: the question's own tokens, then its choices, which branch where their tokens differ.
Several trees lie end to end in one row of a batch of one, and a mask lets every token see just the tokens it follows:
no padding, no repeated prompt, no copy of the keys and values per question or choice.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lofit_fast.data.encode import branches, closed, noted
from lofit_fast.data.lengths import check_count
from lofit_fast.data.pack import GROUPED
from lofit_fast.evaluation.division import Division
from lofit_fast.evaluation.finite_logits import check_scores
from lofit_fast.evaluation.token_trees import TokenTree, common_beginning, question_trees, side_by_side
from lofit_fast.models.next_tokens import later_tokens_seen, said_bidirectional
from lofit_fast.models.trials import SHARED, rounding, said_of, trial_examples, trying
from lofit_fast.models.vocabulary import check_ids
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.cache_names import cache_name
from lofit_fast.patching.families import ARCHITECTURES
from lofit_fast.patching.patched import acting_on, evaluating
from lofit_fast.patching.placement import dtype_of
from lofit_fast.ranks import apart
from lofit_fast.torch_defaults import on_the_cpu

# tokens per forward: attention is dense over the row, so that a longer one spends more on what the mask hides
MAX_TOKENS = 256
# of one forward's logits
_LOGIT_BYTES = 2**28
# numbers of float32 logits at a time, while they are normalised
_SLICE = 2**24

# families whose rows of several sequences the tests prove; others are tried on a few tokens first
_PROVED = {"llama", "gemma", "gemma2", "gemma3_text", "qwen3", "mistral", "qwen2"}
# kinds of layers that a mask of our own can be made for
_MASKED_LAYERS = {"full_attention", "sliding_attention"}

_COUNT = "logits_to_keep"

_log = logging.getLogger(__name__)


@on_the_cpu
def score_choices(
    model: nn.Module,
    tokenizer,
    questions: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    shared_prefix: str = "",
    end: bool | Sequence[bool] = False,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[Tensor]:
    """log p(choice | shared_prefix + question), summed over its tokens: a float32 row per question, on the CPU.

    choices: per question its own list, of any number and length. shared_prefix: put before every question, a few-shot
    prompt for instance. end: score the end-of-sequence token after each choice too, so that none gains by being the
    beginning of another; of all questions, or of each. It is added as in training: once, and to no `Rendered` choice.
    Prefix, question and choice are tokenized joined, as in training, and what prompts share is found in their tokens,
    so that a token reaching over a seam is the one it is in the joint text. Where a choice changes the last tokens of
    its prompt, all choices of the question are scored from there on, and a `BoundaryWarning` says so.
    max_tokens: of a forward. Memory is bounded by the keys and values of the common beginning (P tokens) plus those,
    the mask (max_tokens x (P + max_tokens)), and 256 MiB of logits, whatever the number of questions; a single path
    longer than max_tokens runs alone.
    Where `packing_refusal` gives a reason, it is logged and each choice takes a forward of its own: slow, exact too.
    In a launch of several processes all must call it with the same questions; they divide the forwards.
    A model with a module whose `depends_on_prompt` is true runs every prompt whole, and by itself, before its choices.
    Raises ValueError for a question without choices, a choice without tokens, tokens that the model has no embedding
    for, or a prompt and choice that do not fit the model's context; FloatingPointError where logits are not finite.
    """
    if len(questions) != len(choices):
        raise ValueError(f"expected a list of choices per question, got {len(choices)} for {len(questions)} questions")
    check_count("max_tokens", max_tokens)
    ends = [end] * len(questions) if isinstance(end, bool) else list(end)
    if len(ends) != len(questions):
        raise ValueError(f"expected end for each question, got {len(ends)} for {len(questions)} questions")
    for question, options in zip(questions, choices, strict=True):
        if isinstance(options, str) or not len(options):
            raise ValueError(f"expected a list of choices for the question {question[:60]!r}, got {options!r}")
    prompts, endings = choice_tokens(tokenizer, shared_prefix, questions, choices, ends)
    check_ids(model, prompts, "question")
    for number, (prompt, rows) in enumerate(zip(prompts, endings, strict=True), start=1):
        check_ids(model, rows, f"question {number}, choice")
        check_room(model, [prompt], max(map(len, rows)))
    reason = packing_refusal(model)
    if reason is None and not (text_config(model).model_type in _PROVED and _takes_caches(model)):
        reason = _tree_refusal(model)
    if reason is not None:
        _log.warning("scoring takes a forward per choice: %s", reason)
    score = _score_packed if reason is None else _score_singly
    if reason is None and any(getattr(module, "depends_on_prompt", False) for module in model.modules()):
        score = _score_by_question
    # a question's forwards are as many as its choices take
    division = Division(model, "scoring", even=score is not _score_by_question)
    division.check_same(list(zip(prompts, endings, strict=True)), "questions and choices")
    found: dict[tuple[int, int], float] = {}
    # by forwards, of which some have more choices than others
    total = sum(map(len, endings)) if division.same else None
    with division.together(), evaluating(model), division.bar(total, progress) as bar:
        for question, choice, value in score(model, prompts, endings, max_tokens, division):
            found[question, choice] = value
            bar.update()
    found = division.put_together(found)
    check_scores(found, dict(enumerate(questions)))
    rows = ([found[q, c] for c in range(len(of))] for q, of in enumerate(endings))
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def choice_tokens(
    tokenizer, prefix: str, questions: Sequence[str], choices: Sequence[Sequence[str]], ends: Sequence[bool]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """(token ids of every question, behind the prefix; per question those of its choices that are scored)."""
    found = (branches(tokenizer, _joined(prefix, q), options) for q, options in zip(questions, choices, strict=True))
    pairs = list(noted(found))
    scored = [
        [closed(ending, choice, tokenizer) if end else ending for ending, choice in zip(endings, options, strict=True)]
        for (_, endings), options, end in zip(pairs, choices, ends, strict=True)
    ]
    return [start for start, _ in pairs], scored


def packing_refusal(model: nn.Module, attention: str | None = None) -> str | None:
    """Why sequences with a common beginning cannot share one row, or None where they can.

    attention: what the model will have by then, if not what it has.
    """
    config = text_config(model)
    attention = attention or config._attn_implementation
    if config.model_type not in ARCHITECTURES:
        return f"it is not known whether model_type {config.model_type!r} obeys a mask of our own"
    if attention not in ("eager", "sdpa", GROUPED):
        return f"attention {attention!r} takes no mask of our own: load the model with eager or sdpa"
    if others := set(getattr(config, "layer_types", None) or ()) - _MASKED_LAYERS:
        return f"it has layers that take no mask of our own: {', '.join(sorted(others))}"
    return length_refusal(model)


def length_refusal(model: nn.Module) -> str | None:
    """Why sequences give other results in one row than apart, where a trial of a few tokens cannot show it; or None."""
    config = text_config(model)
    # a mask of ours, or none, would take that away without a word
    if said_bidirectional(model) or later_tokens_seen(model):
        return "attention is bidirectional"
    if not {"dynamic", "longrope"}.isdisjoint(_rope_types(getattr(config, "rope_parameters", None) or {})):
        return "its rotary embedding depends on the length of the whole sequence"
    return None


def _tree_refusal(model: nn.Module) -> str | None:
    """The same, found by scoring a few tokens in both ways."""
    rows = trial_examples(model)
    starts = [row["input_ids"][: SHARED + 1] for row in rows]
    endings = [[row["input_ids"][SHARED + 1 :], row["input_ids"][:1:-1]] for row in rows]
    with apart():
        everything = Division(model, "trying")
    with trying(model):
        try:
            expected = {(q, c): value for q, c, value in _score_singly(model, starts, endings, MAX_TOKENS, everything)}
        # the model needs more than tokens: the simplest call shows it
        except Exception as error:
            return f"{type(model).__name__} cannot be tried: {said_of(error)}"
        try:
            got = {(q, c): value for q, c, value in _score_packed(model, starts, endings, MAX_TOKENS, everything)}
        except Exception as error:
            return f"{type(model).__name__} takes no row of several sequences: {said_of(error)}"
    away = max(abs(got[key] / value - 1) for key, value in expected.items())
    # a sum of logarithms, of some digits more than each
    if away > rounding(model):
        return f"in a row of several sequences {type(model).__name__}'s scores are {away:.1e} away from those alone"
    return None


def check_room(model: nn.Module, encoded: list[list[int]], more: int) -> None:
    """Raise ValueError unless the longest of the encoded prompts and `more` tokens fit the model's context."""
    context = getattr(text_config(model), "max_position_embeddings", None)
    longest = max(map(len, encoded), default=0)
    if context is not None and longest + more > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {more} more do not fit the model's context of {context}: shorten the "
            "prompt" + (", or ask for fewer new tokens" if more else "")
        )


class _Prefix:
    """The cache a forward is given: keys and values (1, heads, P, D) per layer, kept once and never added to."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.filling = True

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """What the layer attends to: the prefix's keys and values before its own."""
        if self.filling:
            self.layers[layer] = keys, values
        if self.filling or layer not in self.layers:
            return keys, values
        before = self.layers[layer]
        return torch.cat((before[0], keys), 2), torch.cat((before[1], values), 2)

    def get_seq_length(self, layer: int = 0) -> int:
        """P."""
        return self.layers[layer][0].shape[2] if layer in self.layers else 0


def _score_packed(model, prompts, endings, max_tokens: int, division: Division) -> Iterator[tuple[int, int, float]]:
    """(question, choice, score) of every choice that is this process's."""
    shared = common_beginning(prompts)
    prefix = _Prefix()
    if shared:
        # no vector acts here: it ends before the last token of every prompt
        _forward(model, TokenTree.chain(shared), prefix, 0, [len(shared) - 1], acting=())
    prefix.filling = False
    max_rows = _max_rows(model)
    trees = question_trees([prompt[len(shared) :] for prompt in prompts], endings, max_tokens, max_rows)
    for tree, counts in division.mine(list(side_by_side(trees, max_tokens, max_rows))):
        scores = list(_tree_scores(model, tree, prefix, len(shared)))
        yield from scores if counts else ()


def _score_by_question(
    model, prompts, endings, max_tokens: int, division: Division
) -> Iterator[tuple[int, int, float]]:
    """The same, a whole prompt at a time, and then its choices."""
    max_rows = _max_rows(model)
    for question, _ in division.mine(range(len(prompts))):
        prompt, rows = prompts[question], endings[question]
        prefix = _Prefix()
        first = _forward(model, TokenTree.chain(prompt), prefix, 0, [len(prompt) - 1])
        prefix.filling = False
        for tree in question_trees([[]], [rows], max_tokens, max_rows):
            for _, choice, value in _tree_scores(model, tree, prefix, len(prompt), first):
                yield question, choice, value


def _tree_scores(model, tree, prefix, offset: int, first: Tensor | None = None) -> Iterator[tuple[int, int, float]]:
    """Those of a tree's choices. first: (1, vocabulary), the logits of node -1, where a choice begins there."""
    nodes = sorted(tree.predicting() - {-1})
    logits = [] if first is None else [first]
    if nodes:
        logits.append(_forward(model, tree, prefix, offset, nodes))
    row_of = {node: row for row, node in enumerate(nodes if first is None else [-1, *nodes])}
    rows, tokens = [row_of[node] for node, *_ in tree.targets], [token for _, token, *_ in tree.targets]
    sums: dict[tuple[int, int], float] = {}
    for (_, _, question, choice), value in zip(tree.targets, _log_p(torch.cat(logits), rows, tokens), strict=True):
        sums[question, choice] = sums.get((question, choice), 0.0) + value
    yield from ((question, choice, value) for (question, choice), value in sums.items())


def _score_singly(model, prompts, endings, _, division: Division) -> Iterator[tuple[int, int, float]]:
    """The same, a whole sequence at a time."""
    takes = _takes_counts(model)

    def asked(count: int) -> dict[str, int]:
        return {"logits_to_keep": count} if takes else {}

    choices = [(question, choice) for question, rows in enumerate(endings) for choice in range(len(rows))]
    for (question, choice), counts in division.mine(choices):
        prompt, ending = prompts[question], endings[question][choice]
        ids = torch.tensor([prompt + ending[:-1]], device=model.device)
        with acting_on(model, torch.arange(ids.shape[1], device=ids.device)[None] >= len(prompt) - 1):
            logits = model(input_ids=ids, use_cache=False, **asked(len(ending))).logits[0, -len(ending) :]
        value = sum(_log_p(logits, list(range(len(ending))), ending))
        if counts:
            yield question, choice, value


def _takes_caches(model) -> bool:
    """Whether the forward names a cache, or names nothing, as one does that somebody has put around it to listen."""
    kinds = inspect.signature(model.forward).parameters.values()
    named = {one.name for one in kinds if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    return bool(named & {"past_key_values", "cache"}) or not named


def _takes_counts(model) -> bool:
    """Whether the model's forward names logits_to_keep, or that of the model inside a wrapper."""
    return any(_names_count(module) for module in model.modules() if hasattr(module, "get_output_embeddings"))


def _names_count(module: nn.Module) -> bool:
    own = inspect.signature(module.forward).parameters
    # a forward that somebody has put around the class's own passes on what it does not name
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    return _COUNT in own or (passes_on and _COUNT in inspect.signature(type(module).forward).parameters)


def _max_rows(model) -> int:
    """How many rows of logits a forward may give."""
    # not the head's weight, which a quantized model may lack
    return max(1, _LOGIT_BYTES // (text_config(model).vocab_size * dtype_of(model).itemsize))


def _forward(
    model, tree: TokenTree, prefix: _Prefix, offset: int, nodes: list[int], acting: Sequence[int] | None = None
) -> Tensor:
    """(nodes, vocabulary): logits of some nodes of a tree that follows `offset` tokens of prefix.

    acting: the nodes where vectors for answers alone act; None for those whose logits are wanted, as these predict a
    token of a choice.
    """
    # as places in the row, which every forward with logits_to_keep takes
    keep = torch.tensor(nodes, device=model.device)
    takes = _takes_counts(model)
    positions = torch.tensor(tree.depths) + offset
    seen = tree.sight(offset)
    key_positions = torch.cat((torch.arange(offset), positions))
    masks = _masks(text_config(model), seen, positions[:, None] - key_positions, model)
    acts = torch.zeros(1, len(tree.tokens), dtype=torch.bool)
    acts[0, nodes if acting is None else list(acting)] = True
    with acting_on(model, acts.to(model.device)):
        out = model(
            input_ids=torch.tensor([tree.tokens], device=model.device),
            position_ids=positions[None].to(model.device),
            attention_mask=masks,
            use_cache=True,
            **{cache_name(model): prefix},
            **({"logits_to_keep": keep} if takes else {}),
        )
    return out.logits[0] if takes else out.logits[0, keep]


def _masks(config, seen: Tensor, distance: Tensor, model) -> Tensor | dict[str, Tensor]:
    """What is added to the attention scores, in the form the model's family takes; distance: (n, keys) in tokens."""

    def additive(visible: Tensor) -> Tensor:
        hidden = torch.finfo(model.dtype).min
        mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill_(~visible, hidden)
        return mask[None, None].to(model.device)

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in types:
        # the model picks one by the type of each layer
        near = additive(seen & (distance < window))
        return {"full_attention": additive(seen), "sliding_attention": near}
    slides = window is not None and not types
    return additive(seen & (distance < window) if slides else seen)


def _log_p(logits: Tensor, rows: list[int], tokens: list[int]) -> list[float]:
    """log softmax(logits)[row, token] of each pair, in float32 at least. logits: (rows, vocabulary)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    norms = torch.cat([part.to(wide).logsumexp(1) for part in logits.split(max(1, _SLICE // logits.shape[1]))])
    at = torch.tensor(rows, device=logits.device)
    picked = logits[at, torch.tensor(tokens, device=logits.device)].to(wide) - norms[at]
    # beside an infinite logit any other would have no probability at all
    return picked.where(norms[at].isfinite(), math.nan).tolist()


def _joined(prefix: str, question: str) -> str:
    # a question that a chat template has rendered stays one
    return prefix + question if prefix else question


def _rope_types(parameters: dict) -> set[str]:
    """Of one rotary embedding, or of one per layer type."""
    if "rope_type" in parameters:
        return {parameters["rope_type"]}
    return {row["rope_type"] for row in parameters.values() if isinstance(row, dict) and "rope_type" in row}
