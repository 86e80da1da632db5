"""What is adapted (LofitConfig) and how it is trained (Recipe): plain, frozen data."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

Head = tuple[int, int]
HeadSet = Literal["all"] | tuple[Head, ...] | None
# what may be given for it
GivenHeads = Literal["all"] | Iterable[Head] | None
# on which tokens the vectors act
POSITIONS = ("all", "answer")


@dataclass(frozen=True)
class LofitConfig:
    """Which heads get which vectors.

    scale, offset: "all", an iterable of (layer, head) pairs, or None for no such component. The two may differ.
    init_std: standard deviation of the normal both start from. seed: of that draw, the same on every device.
    positions: the tokens that the vectors act on: "all", or "answer", from the last token of the prompt on.
    Raises ValueError / TypeError for no component at all, an empty list, a pair listed twice, or anything not a pair.
    """

    scale: HeadSet = None
    offset: HeadSet = None
    init_std: float = 1e-3
    seed: int = 42
    positions: Literal["all", "answer"] = "all"

    if TYPE_CHECKING:
        # a dataclass's own would ask for what is kept
        def __init__(
            self,
            scale: GivenHeads = None,
            offset: GivenHeads = None,
            init_std: float = 1e-3,
            seed: int = 42,
            positions: Literal["all", "answer"] = "all",
        ) -> None: ...

    def __post_init__(self) -> None:
        for component in ("scale", "offset"):
            object.__setattr__(self, component, _head_set(component, getattr(self, component)))
        if self.scale is None and self.offset is None:
            raise ValueError("nothing to adapt: expected scale and/or offset to be 'all' or a list of (layer, head)")
        std = plain_number(self.init_std)
        if std is None or not 0 <= std <= sys.float_info.max:
            raise ValueError(f"expected a finite number init_std >= 0, got {shown(self.init_std)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            raise TypeError(f"expected seed to be a whole number, got {self.seed!r}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"expected seed in [-2**63, 2**64), which torch's generators take, got {shown(self.seed)}")
        object.__setattr__(self, "init_std", std)
        object.__setattr__(self, "seed", int(self.seed))
        check_positions(self.positions)


def check_positions(positions: object) -> None:
    """Raise ValueError for what is none of POSITIONS."""
    if not isinstance(positions, str) or positions not in POSITIONS:
        raise ValueError(f"expected positions to be 'all' or 'answer', got {shown(positions)}")


def _head_set(component: str, heads: object) -> HeadSet:
    if heads is None:
        return None
    if isinstance(heads, str) and heads == "all":
        return "all"
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise TypeError(f"expected {component} to be 'all', None or a list of (layer, head), got {shown(heads)}")
    pairs = tuple(_pair(component, item) for item in heads)
    if not pairs:
        raise ValueError(f"{component} is an empty list of heads: expected at least one, or None to leave it out")
    twice = sorted(pair for pair, count in Counter(pairs).items() if count > 1)
    if twice:
        raise ValueError(f"{component} lists heads more than once: {shown(twice)}")
    return pairs


def shown(value: object) -> str:
    """A value in an error message, which must not be as long as the file that it comes from."""
    try:
        text = repr(value)
    # a number of thousands of digits
    except ValueError:
        text = f"a {type(value).__name__} that is too long to be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain_number(value: object) -> int | float | None:
    """A real number as files have it, whoever's it is: numpy's, a fraction. None for what is none; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return value if isinstance(value, int | float) and type(value) in (int, float) else float(value)
    # a fraction of two huge numbers
    except OverflowError:
        return math.inf


def _pair(component: str, item: Any) -> Head:
    try:
        # numpy's and torch's integers are integers too; a bool is not
        layer, head = (-1 if isinstance(x, bool) else operator.index(x) for x in item)
    except (TypeError, ValueError):
        layer, head = -1, -1
    if layer < 0 or head < 0:
        raise TypeError(f"expected {component} to hold (layer, head) pairs of non-negative integers, got {shown(item)}")
    return layer, head


# which heads are kept of the scores, step 2, and what only a training of step 1 has
_KEPT, _TUNING = ("top", "min_layer"), ("tune_lr", "tune_epochs", "tune_scales")
_TRAINING = ("select_lr", "select_epochs", "max_grad_norm", "init_std")
# the ways to choose heads -> the settings that a way's scores do not depend on
SELECT: dict[str, tuple[str, ...]] = {
    "lofit": (*_KEPT, *_TUNING),
    "early_stop": _TUNING,
    "bias_norm": (*_KEPT, *_TUNING),
    "saliency": (*_KEPT, *_TUNING, *_TRAINING),
    "random": (*_KEPT, *_TUNING, *_TRAINING),
}
_TRAINED = ("lofit", "early_stop", "bias_norm")
# settings of the choice of heads -> the ways to choose that take them
OF_CHOICE: dict[str, tuple[str, ...]] = {
    "select": tuple(SELECT),
    "top": tuple(SELECT),
    "select_lr": _TRAINED,
    "select_epochs": _TRAINED,
    "l1": (*_TRAINED, "saliency"),
    "select_examples": ("saliency",),
}
# and of those that step 2 has too
_OF_BOTH = dict.fromkeys(("batch_size", "positions"), (*_TRAINED, "saliency"))
# those that go through the data once, which few examples may do for
LOOKING_ONCE = ("saliency",)
# what `Recipe.fast` has instead of the paper's
FAST_RECIPE: dict[str, object] = {"select": "saliency", "select_examples": 128}
# and beside it with positions="answer": vectors on fewer tokens want more heads and larger steps
FAST_ANSWER: dict[str, object] = {"top": 0.3, "tune_lr": 4e-2}
# of a whole number: what counts examples, epochs or layers is far below it
_MOST = 2**31 - 1
# settings of which 1 and 1.0 mean the same
_FLOATS = ("select_lr", "tune_lr", "l1", "max_grad_norm", "init_std")
# settings that runs of earlier releases lack, and what these did
_LATER = {"positions": "all", "select": "lofit", "select_examples": None, "tune_scales": False}


@dataclass(frozen=True)
class Recipe:
    """How the two steps are trained. The defaults are the paper's (arXiv:2406.01563, section 4 and appendix).

    select: how step 1 chooses heads, a key of SELECT. "lofit", the paper's: scales on every head are trained; the best
    have the largest norms. "early_stop": the same, ended when the best heads have settled. "bias_norm": offsets on
    every head instead. "saliency": one pass of gradients, no training. "random": drawn from the seed.
    select_examples: how many examples "saliency" looks at, drawn by the seed; None, or more than there are, means all.
    select_lr, select_epochs, l1: step 1, scales on every head, loss + l1 * sum |a|.
    top: heads kept, a count (int) or a fraction of the heads in the running (float in (0, 1]).
    min_layer: the lowest layer whose heads are in the running; a high one keeps the prefix cache long.
    tune_lr, tune_epochs: step 2, fresh offsets on the kept heads of the base model. tune_scales: whether a fresh scale
    is trained beside each offset, without penalty; the paper's adapter has none.
    Both steps: AdamW (0.9, 0.999, no decay), learning rate falling linearly to 0, no warm-up, gradients clipped to
    max_grad_norm. batch_size: examples per optimizer step, split into accumulation_steps micro-batches.
    max_length: longest prompt + completion in tokens; None means the model's context.
    positions: the tokens that the vectors of both steps act on, as of `LofitConfig`.
    """

    select_lr: float = 5e-3
    select_epochs: int = 5
    l1: float = 5e-4
    top: int | float = 0.03
    min_layer: int = 0
    tune_lr: float = 1e-2
    tune_epochs: int = 5
    batch_size: int = 8
    accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    init_std: float = 1e-3
    seed: int = 42
    max_length: int | None = None
    eval_batch_size: int = 32
    positions: Literal["all", "answer"] = "all"
    select: str = "lofit"
    select_examples: int | None = None
    tune_scales: bool = False

    def __post_init__(self) -> None:
        whole = ("select_epochs", "min_layer", "tune_epochs", "batch_size", "accumulation_steps", "seed")
        for name in (*whole, "eval_batch_size"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"expected {name} to be an integer, got {shown(getattr(self, name))}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected seed in [0, 2**32), got {shown(self.seed)}")
        for name in (*whole, "eval_batch_size"):
            if name != "seed" and getattr(self, name) > _MOST:
                raise ValueError(f"expected {name} <= {_MOST}, got {shown(getattr(self, name))}")
        for name in _FLOATS:
            value = plain_number(getattr(self, name))
            if value is None:
                raise TypeError(f"expected {name} to be a number, got {shown(getattr(self, name))}")
            # max_grad_norm may be infinite: nothing is clipped then
            if abs(value) > sys.float_info.max and (name != "max_grad_norm" or value != math.inf):
                raise ValueError(f"expected a finite {name}, got {shown(value)}")
            # 1 and 1.0 are the same run
            object.__setattr__(self, name, float(value))
        if self.max_length is not None and type(self.max_length) is not int:
            raise TypeError(f"expected max_length to be an integer or None, got {shown(self.max_length)}")
        positive = ("select_lr", "tune_lr", "batch_size", "accumulation_steps", "max_grad_norm", "eval_batch_size")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in ("select_epochs", "min_layer", "tune_epochs", "l1", "init_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        if self.max_length is not None and not self.max_length > 0:
            raise ValueError(f"expected max_length > 0, or None, got {self.max_length}")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into accumulation_steps {self.accumulation_steps}"
            )
        if not isinstance(self.tune_scales, bool):
            raise TypeError(f"expected tune_scales to be True or False, got {shown(self.tune_scales)}")
        check_top(self.top)
        check_positions(self.positions)
        _check_select(self.select, self.select_examples)

    @classmethod
    def fast(cls, **settings: Any) -> Recipe:
        """The preset of fast runs, FAST_RECIPE, with `settings` instead; see docs/guide.md for what it costs.

        The heads are chosen by one pass of gradients over few examples. With positions="answer", FAST_ANSWER is of the
        preset too. The rest is as ever. `Engine.fast()` is its half of the engine. Raises what `Recipe` raises.
        """
        return cls(**fast_settings(settings))

    def identity(self) -> dict[str, object]:
        """The settings that make two runs the same one. What came later is named where it differs from its default."""
        return {name: value for name, value in asdict(self).items() if _LATER.get(name, ...) != value}

    @staticmethod
    def floats(kept: Mapping[str, object]) -> dict[str, object]:
        """An `identity` of an earlier release, which kept a whole number for a setting as the int that it was."""
        return {name: float(x) if name in _FLOATS and type(x) is int else x for name, x in kept.items()}

    def of_step1(self) -> dict[str, object]:
        """The settings that step 1 depends on: those with the same have the same scores."""
        return {name: value for name, value in self.identity().items() if name not in SELECT[self.select]}


def fast_settings(settings: Mapping[str, Any], of_task: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fast preset with `settings` instead: what is said explicitly wins, and takes along what it has no use for.

    of_task: a row of RECIPES. It wins over FAST_RECIPE, and FAST_ANSWER wins over it.
    """
    beside = FAST_ANSWER if settings.get("positions") == "answer" else {}
    chosen = {**FAST_RECIPE, **(of_task or {}), **beside, **settings}
    if chosen["select"] not in LOOKING_ONCE and "select_examples" not in settings:
        del chosen["select_examples"]
    return chosen


def check_choice(given: Mapping[str, str], ways: Sequence[str], heads: str | None = None) -> None:
    """Raise ValueError for a setting of the choice of heads that nothing takes.

    given: settings of the choice that were said, with what errors call each. ways: to choose heads. heads: what errors
    call given heads, beside which nothing is chosen.
    """
    if heads is not None and given:
        raise ValueError(f"{heads} gives the heads, so there is nothing for {' or '.join(given.values())} to choose")
    takers = {**OF_CHOICE, **_OF_BOTH}
    for key, name in given.items():
        if not set(ways) & set(takers[key]):
            raise ValueError(f"{name} is of {', '.join(takers[key])}, got {', '.join(ways)}")


def _check_select(select: object, examples: object) -> None:
    if not isinstance(select, str) or select not in SELECT:
        raise ValueError(f"expected select to be one of {', '.join(SELECT)}, got {select!r}")
    if examples is None:
        return
    if type(examples) is not int:
        raise TypeError(f"expected select_examples to be an integer or None, got {examples!r}")
    if examples < 1:
        raise ValueError(f"expected select_examples >= 1, or None for all, got {examples}")
    if select not in LOOKING_ONCE:
        raise ValueError(
            f"select_examples={examples} is of select={' or '.join(map(repr, LOOKING_ONCE))}, which look at the data "
            f"once: expected None with select={select!r}"
        )


def check_top(top: int | float) -> None:
    """Raise ValueError unless `top` is a count >= 1 or a fraction in (0, 1]."""
    if isinstance(top, bool) or not isinstance(top, int | float):
        raise ValueError(f"expected top to be a count (int) or a fraction (float), got {top!r}")
    if isinstance(top, int) and top < 1:
        raise ValueError(f"expected a count of at least 1 head, got top={top}")
    if isinstance(top, float) and not 0 < top <= 1:
        raise ValueError(f"expected a fraction of heads in (0, 1], got top={top}")


# what the paper sets per task, for its 7B Gemma; see docs/guide.md
RECIPES: dict[str, dict[str, float]] = {
    "clutrr": {"select_lr": 5e-4, "l1": 5e-3, "tune_lr": 1e-2},
    "mquake": {"select_lr": 5e-3, "l1": 5e-4, "tune_lr": 8e-3},
    "truthfulqa": {"select_lr": 5e-3, "l1": 5e-4, "tune_lr": 2e-2},
}
