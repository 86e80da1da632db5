"""A tiny base with two adapters behind the server's application, and clients of it in this process."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager

import pytest

import lofit_fast as lf
from tests.oracle import randomize
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

CONFIGS = {
    "moved": lf.LofitConfig(offset=[(0, 1), (2, 3)]),
    "further": lf.LofitConfig(offset=[(1, 1), (2, 3)]),
    "scaled": lf.LofitConfig(scale="all", offset=[(1, 0)]),
    "answers": lf.LofitConfig(offset=[(0, 0), (1, 2)], positions="answer"),
}


def adapter_folders(folder):
    """An adapter folder of each of CONFIGS, with vectors that change every answer."""
    for number, (name, config) in enumerate(CONFIGS.items()):
        handle = lf.patch(tiny_model("llama"), config)
        randomize(handle, std=1.0, seed=number)
        handle.save(folder / name)
    return {name: folder / name for name in CONFIGS}


@contextmanager
def running(folders, chat=True, **limits):
    """A scope with (application, switch) of the tiny base and these adapters."""
    from lofit_fast.serving.adapter_switch import AdapterSwitch
    from lofit_fast.serving.web_app import Limits, web_app

    switch = AdapterSwitch(tiny_model("llama"), "base", folders)
    app = web_app(switch, tiny_tokenizer(chat=chat), Limits(**limits))
    try:
        yield app, switch
    finally:
        app.state.answers.close()


def posted(app, *bodies, path="/v1/completions", **options):
    """The responses to requests that are made at once, in their order. bodies: as JSON, or bytes as they are."""
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}

    async def ask():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
            contents = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
            return await asyncio.gather(*(client.post(path, content=c, headers=headers) for c in contents))

    return asyncio.run(ask())


def got(app, path, host="127.0.0.1:8000"):
    """The response to a GET."""

    async def ask():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.get(path)

    return asyncio.run(ask())


def events_of(response):
    """The events of a stream, parsed; the last one must say that it is done."""
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
