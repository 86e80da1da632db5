"""The server's addresses: OpenAI's protocol, a page to chat in, and whether it is well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lofit_fast.serving.answer_queue import AnswerQueue, ClosedError, Piece, Question, QueueFullError
from lofit_fast.serving.openai_answers import DONE, Shape, error_event, error_of, models_of
from lofit_fast.serving.openai_requests import BadRequestError, ChatRequest, CompletionRequest, parsed
from lofit_fast.serving.prompts import Prompts

if TYPE_CHECKING:
    from lofit_fast.serving.adapter_switch import AdapterSwitch

BODY_BYTES = 2**20
# the page asks nobody but this server
_PAGE = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/chat.css": ("chat.css", "text/css"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
# how often an answer that is sent whole looks whether its client is still there
_LOOK_SECONDS = 0.5
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """waiting: requests that may wait. body: bytes of one. new_tokens: of an answer that does not say how many."""

    waiting: int = 128
    body: int = BODY_BYTES
    new_tokens: int = 512


def web_app(switch: AdapterSwitch, tokenizer: Any, limits: Limits | None = None, host: str = "127.0.0.1") -> FastAPI:
    """The application. switch: the base and its adapters; from now on they are the application's.

    host: the address that it is served on. Where that is this machine alone, requests that name another are refused, so
    that no web page reaches it under a name of its own. `app.state.answers` is the queue, which its lifespan closes.
    """
    limits = limits or Limits()
    answers = AnswerQueue(switch, tokenizer, limits.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(answers.close)

    # its own pages of documentation load scripts from elsewhere
    app = FastAPI(title="lofit-fast", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.answers = answers
    if host in _LOOPBACK:
        # what the middleware makes of "[::1]:8000"
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*_LOOPBACK, "["], www_redirect=False)
    _answer_errors(app)
    _add_pages(app)
    prompts = Prompts(switch.model, tokenizer, limits.new_tokens)
    _add_models(app, switch, answers, prompts)
    _add_questions(app, answers, prompts, limits.body)
    return app


def _answer_errors(app: FastAPI) -> None:
    """What goes wrong, in the protocol's form."""

    @app.exception_handler(BadRequestError)
    async def bad(_: Request, error: BadRequestError) -> Response:
        status = 404 if error.code == "model_not_found" else 400
        return JSONResponse(error_of(str(error), status, error.param, error.code), status)

    @app.exception_handler(HTTPException)
    # no such address, and an address with another method, which are raised by what FastAPI is built on
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse(error_of(str(error.detail), error.status_code), error.status_code, headers=error.headers)

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> Response:
        return JSONResponse(error_of(str(error), 503, code="queue_full"), 503, headers={"Retry-After": "1"})

    @app.exception_handler(ClosedError)
    async def closed(_: Request, error: ClosedError) -> Response:
        return JSONResponse(error_of(str(error), 503), 503)


def _add_pages(app: FastAPI) -> None:
    for path, (name, kind) in _PAGE.items():
        content = files("lofit_fast.serving").joinpath("page", name).read_bytes()
        app.get(path)(_page(content, kind))


def _page(content: bytes, kind: str) -> Callable:
    async def page() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=_PAGE_HEADERS)

    return page


def _add_models(app: FastAPI, switch: AdapterSwitch, answers: AnswerQueue, prompts: Prompts) -> None:
    started = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "pending": answers.pending, "chat": prompts.chats}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return models_of(switch.names, started)

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, switch.names)
        return next(row for row in models_of(switch.names, started)["data"] if row["id"] == name)


def _add_questions(app: FastAPI, answers: AnswerQueue, prompts: Prompts, most: int) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parsed(CompletionRequest, await _body(request, most))
        _check_model(asked.model, answers.switch.names)
        # tokenizers are slow with long texts, and others are being answered
        ids = await asyncio.to_thread(prompts.of_text, asked.text)
        return await _answered(request, answers, asked, prompts, ids, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parsed(ChatRequest, await _body(request, most))
        _check_model(asked.model, answers.switch.names)
        ids = await asyncio.to_thread(prompts.of_messages, [message.plain() for message in asked.messages])
        return await _answered(request, answers, asked, prompts, ids, chat=True)


def _check_model(name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise BadRequestError(
            f"there is no model {name[:100]!r} here: expected one of {', '.join(names)}", "model", "model_not_found"
        )


async def _body(request: Request, most: int) -> bytes:
    """A request's body. Raises HTTPException for one of another kind, or too large, before it is read."""
    # which also makes a browser ask before another site's page may send one
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected Content-Type: application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise HTTPException(413, f"the body has more than {most} bytes", headers={"Connection": "close"})
    return body


async def _answered(
    request: Request,
    answers: AnswerQueue,
    asked: CompletionRequest | ChatRequest,
    prompts: Prompts,
    ids: list[int],
    chat: bool,
) -> Response:
    """Ask, and answer whole or in a stream. Whoever goes away is not answered on."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

    def tell(piece: Piece) -> None:
        # a loop that is closed has nobody to tell
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    question = Question(asked.model, ids, prompts.sampling(asked, ids), tell)
    answers.ask(question)
    shape = Shape(chat, asked.model, len(ids))
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = _events(question, pieces, shape, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    return await _whole(request, question, pieces, shape)


async def _events(question: Question, pieces: asyncio.Queue, shape: Shape, usage: bool) -> AsyncIterator[str]:
    first = True
    try:
        while True:
            piece = await pieces.get()
            if piece.finish == "error":
                yield error_event(piece.error)
                break
            if piece.text or piece.finish:
                yield shape.event(piece.text, piece.finish, first)
                first = False
            if piece.finish:
                if usage:
                    yield shape.usage_event(piece.tokens)
                break
        yield DONE
    finally:
        question.cancel()


async def _whole(request: Request, question: Question, pieces: asyncio.Queue, shape: Shape) -> Response:
    text, look = "", time.monotonic() + _LOOK_SECONDS
    try:
        while True:
            try:
                piece = await asyncio.wait_for(pieces.get(), timeout=max(0.0, look - time.monotonic()))
            except TimeoutError:
                piece = None
            # by the clock: pieces may come faster than this
            if time.monotonic() >= look:
                if await request.is_disconnected():
                    # nobody reads this
                    return Response(status_code=499)
                look = time.monotonic() + _LOOK_SECONDS
            if piece is None:
                continue
            if piece.finish == "error":
                return JSONResponse(error_of(piece.error, 500), 500)
            text += piece.text
            if piece.finish:
                return JSONResponse(shape.whole(text, piece.finish, piece.tokens))
    finally:
        question.cancel()
