"""The application on a port of this machine, until it is told to stop."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from fastapi import FastAPI

# seconds that answers have to end in, once they are told to
_GRACE = 5


class _Server(uvicorn.Server):
    """Ends the answers at the signal, so that their connections, which it waits for, end too."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """What a signal to stop calls."""
        self.config.app.state.answers.stop()
        super().handle_exit(sig, frame)


def listening(host: str, port: int) -> socket.socket:
    """A socket of the address; port 0 takes a free one. Raises OSError naming the address and the reason."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def address_of(listener: socket.socket) -> str:
    """The address for a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer until Ctrl-C, or a signal to terminate: then answers end, and the port is free again."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE, server_header=False
    )
    # which uvicorn raises again once it has shut down
    with listener, suppress(KeyboardInterrupt):
        _Server(config).run(sockets=[listener])
