"""One HTML page about an adapter's heads, which needs nothing else: its pictures are inside it."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lofit_fast.config import Head
from lofit_fast.files import given_path, write_text
from lofit_fast.plots import attention_panels, offsets_map, picture_html
from lofit_fast.selection.adapter_overlap import Overlap
from lofit_fast.selection.written_tokens import Written

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
h1{overflow-wrap:anywhere}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:left;
vertical-align:top}img{max-width:100%}code{background:#f3f3f3;padding:0 .2em;white-space:pre}
.up{color:#176b2c}.down{color:#a61b1b}pre{white-space:pre-wrap;background:#f3f3f3;padding:.6em}"""


@dataclass(frozen=True)
class HeadsReport:
    """What is known of an adapter's heads.

    title: the adapter and its base. prompt: the text that was read, tokens: its tokens, or the last of them, behind
    `before` others. shape: (layers, heads) of the
    base. written: the heads, the longest offset first. maps: (tokens, tokens) attention of some of them. overlaps: with
    others.
    scaled: how many heads the adapter scales.
    """

    title: str
    prompt: str
    tokens: Sequence[str]
    shape: tuple[int, int]
    written: Sequence[Written]
    maps: Mapping[Head, Tensor] = field(default_factory=dict)
    overlaps: Sequence[Overlap] = ()
    scaled: int = 0
    before: int = 0


def of_scales(count: int) -> str:
    """What a reader of offsets should know of an adapter that scales some heads."""
    heads = "1 head is" if count == 1 else f"{count} heads are"
    return f"{heads} scaled, too: what a scale writes depends on the text, and is not shown."


def write_page(report: HeadsReport, path: Path | str) -> Path:
    """Write the page, whole or not at all. Raises OSError naming the folder, ImportError without matplotlib."""
    path = given_path(path)
    with tempfile.TemporaryDirectory() as folder:
        write_text(path, _page(report, Path(folder)))
    return path


def _page(report: HeadsReport, scratch: Path) -> str:
    norms = torch.zeros(report.shape, dtype=torch.float32)
    for one in report.written:
        norms[one.head] = one.norm
    title = html.escape(report.title)
    where = offsets_map(norms, [one.head for one in report.written], scratch / "map.png")
    body = [
        f"<h1>{title}</h1>",
        "<p>Read at the last token of this prompt, where an answer would begin:</p>",
        f"<pre>{html.escape(report.prompt)}</pre>",
        picture_html("Where the offsets are", where),
        "<h2>What each head's offset writes</h2><p>The next tokens whose logits it raises and lowers most, by its "
        "direct path: W v is added behind the last layer, and goes through the model's own norm and head. What the "
        "layers in between make of it is left out.</p>",
        _table(
            ("head", "offset's length", "part of the stream", "raises", "lowers"),
            (
                (
                    f"{one.head[0]}.{one.head[1]}",
                    f"{one.norm:.3g}",
                    f"{one.part:.1%}",
                    _tokens(one.promoted, "up"),
                    _tokens(one.suppressed, "down"),
                )
                for one in report.written
            ),
        ),
        *([f"<p>{of_scales(report.scaled)}</p>"] if report.scaled else []),
        *_attention(report, scratch),
        *_overlap(report.overlaps),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _attention(report: HeadsReport, scratch: Path) -> list[str]:
    if not report.maps:
        return ["<h2>Where the heads look</h2><p>This model's attention keeps no weights to show.</p>"]
    path = attention_panels(report.maps, report.tokens, scratch / "attention.png")
    shown = [picture_html("Where the heads look, the adapter acting: a row for each token that looks", path)]
    if report.before:
        shown.append(
            f"<p>These are the last {len(report.tokens)} tokens of the prompt. What the heads give to the "
            f"{report.before} before them is not shown.</p>"
        )
    return shown


def _overlap(overlaps: Sequence[Overlap]) -> list[str]:
    if not overlaps:
        return []
    rows = (
        (
            html.escape(" and ".join(one.names)),
            f"{one.shared} of {one.heads[0]} and {one.heads[1]}",
            f"{one.by_chance:.1f}",
            f"{one.jaccard:.2f}",
            "-" if one.cosine is None else f"{one.cosine:.2f}",
        )
        for one in overlaps
    )
    names = ("adapters", "shared heads", "by chance", "Jaccard", "offsets' mean cosine there")
    return ["<h2>Beside other adapters</h2>", _table(names, rows)]


def _tokens(pairs: Iterable[tuple[str, float]], kind: str) -> str:
    """Tokens and their changes; white space is shown as it would be typed."""
    shown = ((html.escape(repr(token)[1:-1]), change) for token, change in pairs)
    return " ".join(f'<code>{token}</code>&nbsp;<span class="{kind}">{change:+.2f}</span>' for token, change in shown)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"
