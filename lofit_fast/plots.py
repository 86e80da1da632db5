"""Pictures of a run: which heads were chosen, how the loss fell, and where heads look."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lofit_fast.config import Head
from lofit_fast.extras import needing
from lofit_fast.files import given_path, whole_folder

# what a head is scored by -> what the map of heads calls it
SCORE_NAMES = {
    "lofit": "norm of the scale vector",
    "early_stop": "norm of the scale vector",
    "bias_norm": "norm of the offset vector",
    "saliency": "saliency of the gradients",
    "random": "random number",
}
_STEP_NAMES = {"select": "step 1: vectors on every head", "tune": "step 2: offsets on the chosen heads"}


def heads_map(scores: Tensor, heads: Sequence[Head], path: Path | str, title: str = "", select: str = "lofit") -> Path:
    """A layer x head map of the scores, the chosen heads ringed. scores: (layers, heads). Writes a PNG.

    select: the way the heads were scored, a key of SCORE_NAMES.
    """
    return _map_of_heads(scores, heads, path, title, SCORE_NAMES[select])


def offsets_map(norms: Tensor, heads: Sequence[Head], path: Path | str, title: str = "") -> Path:
    """A layer x head map of the offsets' lengths, heads that have one ringed. norms: (layers, heads). Writes a PNG."""
    return _map_of_heads(norms, heads, path, title, "norm of the offset vector")


def _map_of_heads(values: Tensor, heads: Sequence[Head], path: Path | str, title: str, label: str) -> Path:
    figure, axes = new_figure((1.6 + 0.36 * values.shape[1], 1.6 + 0.22 * values.shape[0]))
    image = axes.imshow(values.numpy(), aspect="auto", origin="lower", cmap="viridis")
    if heads:
        layers, columns = zip(*heads, strict=True)
        axes.scatter(columns, layers, s=52, facecolors="none", edgecolors="red", linewidths=1.4, label="chosen")
    axes.set(xlabel="head", ylabel="layer", title=title)
    axes.set_xticks(range(values.shape[1]))
    figure.colorbar(image, ax=axes, label=label)
    return save_figure(figure, path)


def attention_panels(maps: Mapping[Head, Tensor], tokens: Sequence[str], path: Path | str) -> Path:
    """The attention of some heads over one text, two side by side: a row per token that looks.

    maps: (S, S) each, S tokens. Writes a PNG. Colours go with the root of a weight, so that small ones are seen beside
    the first token's.
    """
    side, columns = 1.4 + 0.13 * len(tokens), min(2, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure, axes = new_figure((side * columns, side * rows), columns, rows)
    axes = [axes] if len(maps) == 1 else list(axes.flat)
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    for axis, ((layer, head), weights) in zip(axes, maps.items(), strict=False):
        axis.imshow(weights.sqrt().numpy(), cmap="magma", vmin=0, vmax=1)
        axis.set_xlabel("looked at")
        # a page shows a large picture smaller
        axis.set_title(f"head {layer}.{head}", fontsize=max(12.0, 2 * side))
        # signs that a font or a layout language would take for its own are shown as they are typed
        names = [repr(token)[1:-1].replace("$", r"\$") for token in tokens]
        axis.set_xticks(range(len(tokens)), names, rotation=90, fontsize=6)
        axis.set_yticks(range(len(tokens)), names, fontsize=6)
    return save_figure(figure, path)


def loss_curves(history: Sequence[dict], path: Path | str, title: str = "") -> Path:
    """Training loss by step and epoch, and evaluation loss where there is one, of both steps. Writes a PNG."""
    # a look without training has seconds and no loss
    history = [row for row in history if "loss" in row]
    stages = [stage for stage in _STEP_NAMES if any(row["stage"] == stage for row in history)]
    figure, axes = new_figure((4.2 * len(stages), 3.2), columns=len(stages))
    for axis, stage in zip(axes if len(stages) > 1 else [axes], stages, strict=True):
        rows = [row for row in history if row["stage"] == stage]
        for row in rows:
            losses = row.get("step_losses", [])
            at = [row["epoch"] - 1 + (i + 1) / len(losses) for i in range(len(losses))]
            axis.plot(at, losses, color="tab:blue", alpha=0.35, linewidth=1)
        epochs = [row["epoch"] for row in rows]
        axis.plot(epochs, [row["loss"] for row in rows], color="tab:blue", marker="o", label="training, epoch mean")
        if "eval_loss" in rows[0]:
            axis.plot(epochs, [row["eval_loss"] for row in rows], color="tab:orange", marker="s", label="validation")
        axis.set_xticks(range(max(epochs) + 1))
        axis.set(xlabel="epoch", ylabel="loss", title=_STEP_NAMES[stage])
        axis.legend(frameon=False)
    figure.suptitle(title)
    return save_figure(figure, path)


def sweep_chart(rows: Sequence[dict], metric: str, path: Path | str, title: str = "") -> Path:
    """A bar of `metric` per run that has it, in the order of the sweep. rows: name and metrics. Writes a PNG."""
    rows = [row for row in rows if row.get(metric) is not None]
    figure, axes = new_figure((6.4, 1.2 + 0.3 * len(rows)))
    axes.barh([row["name"] for row in rows], [row[metric] for row in rows], color="tab:blue")
    axes.invert_yaxis()
    axes.set(xlabel=metric.replace("_", " "), title=title)
    return save_figure(figure, path)


def new_figure(size: tuple[float, float], columns: int = 1, rows: int = 1):
    """(figure, its axes: one, or an array of as many as columns, or of rows by columns) of a size in inches.

    Raises ImportError without matplotlib.
    """
    # the object interface leaves pyplot's global state, and the user's backend, alone
    with needing("matplotlib", "train", "a picture"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def save_figure(figure, path: Path | str) -> Path:
    """Write a figure as PNG, whole or not at all, its folder made if need be. Returns the path.

    A link of that name is replaced, not written through. Raises OSError naming the folder and the reason.
    """
    path = given_path(path)
    with whole_folder(path.parent) as scratch:
        figure.savefig(scratch / path.name, dpi=150)
    return path


def picture_html(title: str, path: Path) -> str:
    """A heading and a PNG below it as HTML, which holds the picture itself."""
    image = base64.b64encode(path.read_bytes()).decode()
    title = html.escape(title)
    return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}">'
