"""Draws the pictures of docs/kernels.md: `python docs/kernels/draw.py`. One function, one picture, one kernel."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "lofit"})

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

HERE = Path(__file__).parent
PLAIN, READ, LISTED, WRITTEN, SUM = "#f2f2f2", "#bcd7f0", "#f6c28b", "#b9deb1", "#dcc6e8"


class Canvas:
    """Matrices as boxes, tiles as coloured parts of them, data as arrows; y runs downwards."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width * 10), ylim=(height * 10, 0))
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str = "", color: str = PLAIN, **more) -> None:
        """A rectangle with a text in its middle."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="#555555", lw=0.8, **more))
        self.text(x + width / 2, y + height / 2, text)

    def tall(self, x: float, y: float, text: str, heads: Sequence[int], color: str, rows: str = "T") -> None:
        """A (T, K) matrix of eight heads, some of them coloured."""
        self.box(x, y, 24, 15)
        for head in heads:
            self.box(x + 3 * head, y, 3, 15, color=color)
        self.text(x + 12, y - 1.6, text)
        self.text(x - 1.4, y + 7.5, rows)

    def text(self, x: float, y: float, text: str, ha: str = "center", **more) -> None:
        """Words, centred on a point unless told otherwise."""
        self.axes.text(x, y, text, ha=ha, va="center", **more)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
        """Data going from here to there."""
        style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": "#333333", "lw": 1}
        self.axes.add_patch(FancyArrowPatch(start, end, **style))
        self.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 1.4, text)

    def save(self, name: str) -> None:
        """Write the picture beside this file."""
        self.figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


def offset() -> None:
    """W v of the selected heads forward; column sum and thin product backward."""
    c = Canvas(8.2, 3.4)
    c.tall(4, 6, "W (N, K): selected heads only", (1, 5), LISTED, "N")
    c.box(35, 6, 3, 15, "v", LISTED)
    c.text(31.5, 13.5, "x")
    c.arrow((39, 13.5), (46, 13.5))
    c.box(47, 6, 3, 15, "Wv", WRITTEN)
    c.text(51, 13.5, "+ b  = the bias of the vendor's GEMM", "left")
    c.text(4, 26, "backward: two launches", "left")
    c.box(4, 28, 12, 4, "dY: block of rows 0", READ)
    c.arrow((16.5, 30), (24, 30))
    c.box(24.5, 28, 12, 4, "partial sums", SUM)
    c.arrow((37, 30), (44, 30))
    c.box(44.5, 28, 12, 4, "sum_t dY  (N)", SUM)
    c.arrow((57, 30), (64, 30), "x W_S")
    c.box(64.5, 28, 8, 4, "dv (h, D)", WRITTEN)
    c.save("offset")


def grouped() -> None:
    """A table of addresses lets one launch read the columns of every layer's W."""
    c = Canvas(8.2, 3.2)
    c.text(3, 3.5, "table: a row per layer", "left")
    for layer in range(3):
        c.box(3, 5.5 + 7 * layer, 17, 5, f"layer {layer}: W, stride, v,\nheads, number of heads", READ)
        c.arrow((20.5, 8 + 7 * layer), (29, 8 + 7 * layer))
        c.box(29.5, 5.5 + 7 * layer, 18, 5)
        for column in (1 + layer, 4 - layer):
            c.box(29.5 + 3 * column, 5.5 + 7 * layer, 3, 5, color=LISTED)
        c.arrow((48, 8 + 7 * layer), (60, 8 + 7 * layer), "W_S v_S")
    c.box(60.5, 5.5, 14, 19, "out (L, N)\none launch", WRITTEN)
    c.text(3, 28.5, "backward: the layers' column sums (L, N), one launch for every dv, one to add its chunks", "left")
    c.save("grouped")


def affine_fwd() -> None:
    """One read and one write of z."""
    c = Canvas(7.2, 2.4)
    c.tall(4, 5, "z (T, K)", (1, 5), LISTED)
    c.box(4, 10, 24, 4, "", "none", ls="--")
    c.text(16, 12, "a block of rows, one head at a time")
    c.arrow((29, 12), (39, 12), "x (1 + a) + v")
    c.tall(41, 5, "z' (T, K), rounded once", range(8), WRITTEN)
    c.save("affine_fwd")


def affine_bwd() -> None:
    """dz, da and dv in one sweep over G and z."""
    c = Canvas(7.6, 4.2)
    c.tall(4, 5, "G = dY W (T, K)", (1, 5), READ)
    c.tall(4, 24, "z (T, K): listed heads only", (1, 5), LISTED)
    c.arrow((29, 12), (41, 12), "x (1 + a)")
    c.tall(43, 5, "dz, may be G's own memory", (1, 5), WRITTEN)
    c.arrow((29, 31), (41, 31), "G z, G")
    c.box(43, 25, 22, 4, "block 0:  sum_t G z | sum_t G", SUM)
    c.box(43, 29, 22, 4, "block 1:  ...", SUM)
    c.arrow((54, 33.5), (54, 36.5))
    c.box(43, 37, 22, 4, "da | dv  (h, D) each", WRITTEN)
    c.save("affine_bwd")


def delta() -> None:
    """The plain main loop over K, then the short one over the selected heads, in one accumulator."""
    c = Canvas(8.2, 4.3)
    c.tall(4, 5, "z: a tile of rows, all of K", range(8), READ)
    c.tall(4, 25, "W: a tile of columns of y, all of K", range(8), READ, "N")
    c.arrow((29, 11), (45, 15), "1. main loop")
    c.arrow((29, 29), (45, 18))
    c.box(46, 13, 15, 8, "float32\naccumulator", SUM)
    for x in (36, 39):
        c.box(x, 31, 2.6, 8, "", LISTED)
    c.text(43.5, 35, "2. second loop, selected heads only:\nround(a z_S) and W_S", "left")
    c.arrow((44, 31.5), (52, 21.5))
    c.arrow((61.5, 17), (69, 17), "+ c")
    c.box(69.5, 13, 9, 8, "y, rounded\nonce", WRITTEN)
    c.save("delta_linear")


def prologue() -> None:
    """The scale applied to each tile of z on its way from shared memory into the matrix units."""
    c = Canvas(8.2, 2.6)
    c.box(3, 8, 11, 8, "z tile", READ)
    c.arrow((14.5, 12), (23, 12))
    c.box(23.5, 8, 14, 8, "registers:\nround((1 + a) z)", LISTED)
    c.arrow((38, 12), (47, 12), "A")
    c.box(3, 19, 11, 5, "W tile", READ)
    c.arrow((14.5, 21.5), (50, 17))
    c.box(47.5, 8, 13, 8, "matrix units,\naccumulator", SUM)
    c.arrow((61, 12), (68, 12), "+ c")
    c.box(68.5, 8, 10, 8, "y, rounded\nonce", WRITTEN)
    c.text(3, 4, "persistent: a program walks over tiles; every step of K goes through this", "left")
    c.save("prologue_linear")


def backward() -> None:
    """A plain GEMM whose epilogue scales, stores and sums slice by slice."""
    c = Canvas(8.2, 4.2)
    c.box(3, 6, 12, 8, "dY: rows", READ)
    c.box(3, 18, 12, 8, "W: columns", READ)
    c.arrow((15.5, 10), (23, 14))
    c.text(19.5, 16, "main loop")
    c.arrow((15.5, 22), (23, 18))
    c.box(23.5, 11, 16, 10, "", SUM)
    for part in range(4):
        c.box(23.5 + 4 * part, 11, 4, 10, "G" if part else "slice", SUM if part else LISTED)
    c.text(31.5, 8.8, "accumulator, 1, 2 or 4 column slices")
    c.arrow((40, 14), (50, 10), "(1 + a) G")
    c.box(50.5, 6, 14, 7, "dz, rounded once", WRITTEN)
    c.arrow((40, 18), (50, 23), "G z, G")
    c.box(50.5, 19, 26, 7, "partials[row block] =\nsum_t G z | sum_t G", SUM)
    c.arrow((63, 26.5), (63, 32), "")
    c.box(50.5, 32.5, 26, 6, "da | dv, a second launch adds the blocks", WRITTEN)
    c.box(3, 32.5, 26, 6, "z, listed heads of this tile only", LISTED)
    c.arrow((29.5, 35), (46, 25))
    c.save("affine_linear_bwd")


def main() -> None:
    """All of them."""
    for picture in (offset, grouped, affine_fwd, affine_bwd, delta, prologue, backward):
        picture()


if __name__ == "__main__":
    main()
