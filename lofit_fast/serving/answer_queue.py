"""A queue of questions and the one thread that answers them, token by token."""

from __future__ import annotations

import queue
import secrets
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from lofit_fast.data.encode import pad_token_id
from lofit_fast.evaluation.finite_logits import FiniteLogits
from lofit_fast.evaluation.generation_settings import StandingAlone, ends_of
from lofit_fast.patching.placement import device_of
from lofit_fast.serving.adapter_switch import AdapterSwitch
from lofit_fast.serving.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QueueFullError(RuntimeError):
    """As many questions wait as are let wait."""


class ClosedError(RuntimeError):
    """The server is shutting down."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. temperature 0: the likeliest token each time. seed: None draws one.

    stop, ends: texts and tokens that end it, besides the model's own.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Piece:
    """A part of an answer: its text, the tokens so far, and of the last one why it ended: stop, length or error."""

    text: str
    tokens: int
    finish: str | None = None
    error: str = ""


_CLOSING = Piece("", 0, "error", "the server is shutting down")


@dataclass
class Question:
    """A prompt's token ids for a model by name. tell: called with each `Piece` by the thread that answers."""

    model: str
    ids: list[int]
    sampling: Sampling
    tell: Callable[[Piece], None]
    gone: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.gone.set()


class AnswerQueue:
    """Answers questions in the order in which they come, one at a time, in a thread of its own.

    limit: how many may wait beside the one that is being answered. An error while one is answered ends that one alone.
    """

    def __init__(self, switch: AdapterSwitch, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self.switch, self.tokenizer, self.limit = switch, tokenizer, limit
        self.ends = ends_of(switch.model, tokenizer)
        # one that a handler of signals may put into, wherever it has interrupted
        self._waiting: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._lock, self._asked, self._closed = threading.Lock(), list[Question](), False
        self._thread = threading.Thread(target=self._work, name="lofit-answers", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Questions that wait or are being answered, and that somebody still waits for."""
        return sum(not question.gone.is_set() for question in list(self._asked))

    def ask(self, question: Question) -> None:
        """Put a question in the queue. Raises QueueFullError, ClosedError."""
        with self._lock:
            if self._closed:
                raise ClosedError(_CLOSING.error)
            if (pending := self.pending) > self.limit:
                raise QueueFullError(f"{pending} requests are waiting already, and {self.limit} may: try again")
            self._asked.append(question)
            # inside: a thread that ends looks once more for what is there, with the same lock
            self._waiting.put(question)

    def close(self, wait: float = 10.0) -> None:
        """End what is being answered and what waits. wait: seconds to give the thread."""
        self.stop()
        self._thread.join(wait)

    def stop(self) -> None:
        """The same without waiting: may be called where nothing may wait, as in a handler of signals."""
        self._closed = True
        self._waiting.put(None)

    def _work(self) -> None:
        while (question := self._waiting.get()) is not None or not self._waiting.empty():
            if question is not None:
                self._answer(question)
                self._done(question)
        for question in self._left():
            _tell(question, _CLOSING)
        self.switch.close()

    def _left(self) -> list[Question]:
        """What was put in while the loop ended. Nothing comes after it: `ask` refuses by now."""
        with self._lock:
            left = [self._waiting.get() for _ in range(self._waiting.qsize())]
        questions = [question for question in left if question is not None]
        for question in questions:
            self._done(question)
        return questions

    def _done(self, question: Question) -> None:
        with self._lock:
            self._asked[:] = [one for one in self._asked if one is not question]

    def _answer(self, question: Question) -> None:
        if question.gone.is_set():
            return
        if self._closed:
            _tell(question, _CLOSING)
            return
        text = TokenText(self.tokenizer, question.sampling.stop, question.ids)
        told = _Told(question, text, self.ends | question.sampling.ends, lambda: self._closed)
        try:
            with self.switch.active(question.model):
                self._generate(question, told)
            told.end_of_answer()
        # whatever it is, the next question is none the worse for it
        except BaseException as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            _tell(question, Piece("", told.tokens, "error", f"{type(error).__name__}: {first}"))

    def _generate(self, question: Question, told: _Told) -> None:
        device, sampling = device_of(self.switch.model), question.sampling
        ids = torch.tensor([question.ids], device=device)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            self.switch.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._config(sampling),
                logits_processor=[FiniteLogits(at_once=True)],
                streamer=told,
                stopping_criteria=[told.is_over],
            )

    def _config(self, sampling: Sampling) -> StandingAlone:
        """Sampling as asked for and nothing else."""
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return StandingAlone(
            **(drawn if sampling.temperature > 0 else {"do_sample": False}),
            max_new_tokens=sampling.max_tokens,
            pad_token_id=pad_token_id(self.tokenizer),
            eos_token_id=sorted(self.ends | sampling.ends) or None,
        )


def _tell(question: Question, piece: Piece) -> None:
    """Tell the last piece. One who cannot be told has gone."""
    with suppress(Exception):
        question.tell(piece)


class _Told:
    """What `generate` tells of its tokens, as a streamer, and asks, as a stopping criterion."""

    def __init__(self, question: Question, text: TokenText, ends: set[int], closed: Callable[[], bool]) -> None:
        self.question, self.text, self.ends, self.closed = question, text, ends, closed
        self.tokens, self._prompt, self._ended = 0, True, False

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, at first, and then a token at a time."""
        if self._prompt:
            self._prompt = False
            return
        for token in tokens.flatten().tolist():
            self.tokens += 1
            self._ended = token in self.ends
            if piece := self.text.add(token):
                self.question.tell(Piece(piece, self.tokens))

    def end(self) -> None:
        """`generate` is through."""

    def is_over(self, ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Whether the answer ends here: (1,) bool."""
        over = self.text.stopped or self.question.gone.is_set() or self.closed()
        return torch.full((len(ids),), over, dtype=torch.bool, device=ids.device)

    def end_of_answer(self) -> None:
        """Tell the last piece."""
        if self.closed():
            self.question.tell(replace(_CLOSING, tokens=self.tokens))
            return
        rest = self.text.rest()
        full = not self.text.stopped and not self._ended and self.tokens >= self.question.sampling.max_tokens
        self.question.tell(Piece(rest, self.tokens, "length" if full else "stop"))
