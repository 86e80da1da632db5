"""The server as a process: a socket that closes in mid-stream, Ctrl-C, a port that is taken."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.calling import error_of
from tests.serving.tiny_server import adapter_folders
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

ROOT = Path(__file__).parents[2]


@contextmanager
def served(*options):
    """A scope with (process, port) of `lofit-fast serve` on a free port."""
    command = [sys.executable, "-m", "lofit_fast.cli", "serve", *map(str, options), "--port", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line, process.communicate(timeout=60)[1][-2000:]
        yield process, int(json.loads(line)["url"].rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a tiny model with room for long answers, and two adapters."""
    folder = tmp_path_factory.mktemp("served")
    # no answer ends by itself
    tiny_model("llama", max_position_embeddings=100_000, eos_token_id=None).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "model")
    named = {name: path for name, path in adapter_folders(folder).items() if name in ("moved", "scaled")}
    adapters = [word for name, path in named.items() for word in ("--adapter", f"{name}={path}")]
    return ["--model", folder / "model", *adapters, "--dtype", "float32", "--device", "cpu"]


def pending(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())["pending"]


def stream(port, tokens=90_000):
    """(connection, response) of a stream that has begun."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": "moved", "prompt": "hello", "max_tokens": tokens, "temperature": 0, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return connection, response


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_client_that_goes_away_and_ctrl_c(options):
    with served(*options) as (process, port):
        connection, response = stream(port)
        assert pending(port) == 1
        response.close()
        connection.close()
        # generation has stopped, and the next one is answered
        until(lambda: pending(port) == 0)
        connection, response = stream(port, tokens=3)
        assert response.read().endswith(b"data: [DONE]\n\n")
        # one that asks whole answers and goes away
        quiet = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        until(lambda: pending(port) == 0)
        body = json.dumps({"model": "model", "prompt": "hello", "max_tokens": 90_000})
        quiet.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: pending(port) == 1)
        quiet.close()
        until(lambda: pending(port) == 0)
        connection, response = stream(port)
        process.send_signal(signal.SIGINT)
        rest = response.read()
        assert b"the server is shutting down" in rest and rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(timeout=30) == 0
        out, errors = process.communicate()
        assert out == "" and "Traceback" not in errors and "error:" not in errors.lower(), errors


@pytest.mark.slow
def test_a_port_that_is_taken(options):
    with served(*options) as (_, port):
        message = error_of("serve", *options, "--port", port)
        assert message.startswith(f"cannot listen on 127.0.0.1, port {port}")


@pytest.mark.parametrize(
    "given, reason",
    [
        (("--adapter", "runs/a"), "expected --adapter like kinship=runs/kinship/adapter, got 'runs/a'"),
        (("--adapter", "a=b", "--adapter", "a=c"), "two adapters are called 'a'"),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid, port 0"),
    ],
)
def test_bad_calls(given, reason):
    assert reason in error_of("serve", "--model", "no-such-model", "--port", "0", *given)
