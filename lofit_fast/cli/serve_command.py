"""`serve`: a base and its adapters behind OpenAI's protocol, with a page to chat in."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lofit_fast.cli.command import err, out
from lofit_fast.cli.options import AtLeast, Device, Dtype, Json, Model, Strict, check_idle

# heavy imports happen inside the commands: --help must be instant


def serve(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="An adapter folder or hub id under a name, kinship=runs/kinship/adapter. May be repeated.",
            metavar="NAME=FOLDER",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. The default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", max=65535), AtLeast(0)] = 8000,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer to a request that does not say max_tokens."), AtLeast(1)
    ] = 512,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait for their turn; one more is told to come again."), AtLeast(0)
    ] = 128,
    dtype: Dtype = "auto",
    device: Device = "auto",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Try adapters side by side: an OpenAI-compatible server and a chat page in the browser. Needs the extra "serve".

    One answer at a time; for many users export the model and serve it with vLLM, SGLang or llama.cpp.
    """
    from lofit_fast.extras import needing
    from lofit_fast.models.load import load_model

    named = _named(adapter or [])
    if not named:
        check_idle("without --adapter there is none to refuse", {"--strict": strict})
    with needing("fastapi", "serve", "serving"), needing("uvicorn", "serve", "serving"):
        from lofit_fast.serving.adapter_switch import AdapterSwitch
        from lofit_fast.serving.web_app import Limits, web_app
        from lofit_fast.serving.web_server import address_of, listening
        from lofit_fast.serving.web_server import serve as run
    # first, since loading takes longer than finding out that the port is taken
    with listening(host, port) as listener:
        base, tokenizer = load_model(model, dtype=dtype, device=device)
        switch = AdapterSwitch(base, _base_name(model), named, strict=strict)
        app = web_app(switch, tokenizer, Limits(waiting=queue, new_tokens=max_new_tokens), host)
        _announce(address_of(listener), switch.names, host, as_json)
        run(app, listener)


def _named(given: list[str]) -> dict[str, str]:
    """Name -> folder. Raises ValueError for anything but name=folder, and for a name that is there twice."""
    adapters: dict[str, str] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            raise ValueError(f"expected --adapter like kinship=runs/kinship/adapter, got {text!r}")
        if name in adapters:
            raise ValueError(f"two adapters are called {name!r}: expected a name for each")
        adapters[name] = folder
    return adapters


def _base_name(model: str) -> str:
    """What requests call the base: the name it was given by, of a path its last part."""
    return Path(model).name if Path(model).exists() else model.rpartition("/")[2]


def _announce(address: str, names: tuple[str, ...], host: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"url": address, "models": names}), flush=True)
        return
    out.print(f"{address}  (chat in the browser; {address}/v1 for OpenAI clients). Ctrl-C stops.", highlight=False)
    out.print(f"models: {', '.join(names)}", highlight=False)
    if host not in ("127.0.0.1", "localhost", "::1"):
        err.print(f"whoever reaches {host} can ask: there are no passwords", highlight=False)
