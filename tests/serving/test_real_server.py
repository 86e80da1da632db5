"""The server as a process: a socket that closes in mid-stream, Ctrl-C, a port that is taken."""

import http.client
import json
import signal
import time

import pytest

from tests.cli.calling import error_of
from tests.serving.served_process import served

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")


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
        (("--strict",), "without --adapter there is none to refuse, so there is nothing for --strict to do"),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid, port 0"),
    ],
)
def test_bad_calls(given, reason):
    assert reason in error_of("serve", "--model", "no-such-model", "--port", "0", *given)
