"""Draw the pictures of the documents as SVG: `python docs/drawings.py` writes docs/drawings/*.svg.

Each picture is 400 units wide, so that its text is legible on a phone.
"""

from __future__ import annotations

import math
from pathlib import Path

INK, SOFT, LINE = "#1c2430", "#eef1f5", "#8a94a3"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
FOLDER = Path(__file__).with_name("drawings")


class Drawing:
    """An SVG of boxes, arrows, rows of channels and text."""

    def __init__(self, height: int, title: str) -> None:
        self.height, self.parts = height, [f"<title>{title}</title>"]

    def text(
        self, x: float, y: float, words: str, size: int = 14, anchor: str = "middle", color: str = INK
    ) -> None:
        style = f'font-size="{size}" text-anchor="{anchor}" fill="{color}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>')

    def rect(self, x: float, y: float, width: float, height: float, style: str) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" stroke="{LINE}" {style}/>'
        )

    def box(self, x: float, y: float, width: float, height: float, words: str = "", fill: str = SOFT) -> None:
        self.rect(x, y, width, height, f'rx="6" fill="{fill}"')
        if words:
            self.text(x + width / 2, y + height / 2 + 5, words)

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        length = math.hypot(to_x - x, to_y - y)
        across, down = (to_x - x) / length, (to_y - y) / length
        left, top = to_x - 8 * across, to_y - 8 * down
        self.parts.append(
            f'<path d="M{x:g} {y:g}L{left:.1f} {top:.1f}" stroke="{INK}" stroke-width="1.5" fill="none"/>'
            f'<path d="M{to_x:g} {to_y:g}L{left - 4 * down:.1f} {top + 4 * across:.1f}'
            f'L{left + 4 * down:.1f} {top - 4 * across:.1f}z" fill="{INK}"/>'
        )

    def channels(self, x: float, y: float, labels: str, size: float = 24, gone: str = "") -> None:
        """Draw a row of squares with labels; those in `gone` are removed."""
        for label in labels:
            removed = label in gone
            fill, ink = ("#ffffff", LINE) if removed else (BLUE, "#ffffff")
            self.rect(x, y, size, size, f'fill="{fill}"' + ' stroke-dasharray="3 3"' * removed)
            self.text(x + size / 2, y + size / 2 + 5, label, color=ink)
            x += size + 2

    def line(self, points: list[tuple[float, float]], color: str) -> None:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{path}" stroke="{color}" stroke-width="2.5" fill="none"/>')

    def write(self, name: str) -> None:
        FOLDER.mkdir(exist_ok=True)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 {self.height}" role="img" '
            f'font-family="system-ui, sans-serif"><rect width="400" height="{self.height}" fill="#ffffff"/>'
        )
        (FOLDER / f"{name}.svg").write_text("\n".join([head, *self.parts, "</svg>", ""]))


def groups() -> None:
    drawing = Drawing(250, "Layers whose outputs are added belong to one group")
    for x, name in ((20, "conv a, norm a"), (230, "conv b, norm b")):
        drawing.box(x, 15, 150, 34, name)
        drawing.channels(x + 24, 60, "0123", gone="2")
        drawing.arrow(x + 75, 90, 200 + (x - 125) * 0.1, 118)
    drawing.box(180, 120, 40, 34, "+")
    drawing.channels(149, 165, "0123", gone="2")
    drawing.arrow(200, 192, 200, 208)
    drawing.box(110, 210, 180, 34, "conv c: input 2 goes")
    drawing.write("groups")


def labels() -> None:
    drawing = Drawing(190, "Labels of channels travel through flatten")
    drawing.box(10, 15, 90, 34, "conv")
    drawing.channels(17, 60, "012", gone="1")
    drawing.arrow(102, 32, 128, 32)
    drawing.box(130, 15, 110, 34, "flatten")
    drawing.channels(108, 60, "001122", gone="1")
    drawing.arrow(242, 32, 268, 32)
    drawing.box(270, 15, 120, 34, "linear")
    drawing.text(330, 77, "inputs 2, 3 go")
    drawing.text(200, 120, "Channel 1 of the convolution holds two values")
    drawing.text(200, 142, "of the flattened image, so two columns")
    drawing.text(200, 164, "of the linear layer go with it.")
    drawing.write("labels")


def equivalence() -> None:
    drawing = Drawing(230, "The masked dense network and the pruned network give the same outputs")
    for y, name, row, gone in ((10, "dense, channel 1 set to 0", "0123", "1"), (100, "pruned", "023", "")):
        drawing.text(20, y + 18, name, anchor="start")
        drawing.channels(20, y + 30, row, gone=gone)
        drawing.arrow(130, y + 42, 178, y + 42)
        drawing.box(180, y + 25, 90, 34, "next layer")
        drawing.arrow(272, y + 42, 318, y + 42)
        drawing.box(320, y + 25, 66, 34, "outputs")
    drawing.text(353, 92, "=", size=22, color=GREEN)
    drawing.text(200, 200, "Equal up to rounding, or the step is refused.")
    drawing.write("equivalence")


def pull() -> None:
    drawing = Drawing(230, "The pull of stage 1 sets scales to exactly 0")
    drawing.line([(45, 15), (45, 190), (385, 190)], LINE)
    drawing.text(22, 100, "|γ|")
    drawing.text(215, 215, "training steps of stage 1")
    drawing.line([(45, 40), (385, 47)], BLUE)
    drawing.text(300, 36, "needed", color=BLUE)
    for color, start, zero in ((ORANGE, 60, 280), (PINK, 90, 220)):
        drawing.line([(45, start), (zero, 190), (385, 190)], color)
    drawing.text(285, 165, "superfluous", color=ORANGE)
    drawing.text(330, 182, "exactly 0", size=13)
    drawing.write("pull")


def proof() -> None:
    drawing = Drawing(300, "How a cut is checked: example inputs, random weights, double precision")
    steps = (
        (10, "compare on the example inputs"),
        (85, "again with random weights"),
        (160, "again in double precision"),
    )
    reasons = ("the outputs do not depend on the cut", "they differ: rounding or error?")
    for y, words in steps:
        drawing.box(60, y, 280, 34, words)
    for (y, _), words in zip(steps, reasons, strict=False):
        drawing.arrow(90, y + 36, 90, y + 73)
        drawing.text(102, y + 59, words, size=13, anchor="start")
    drawing.arrow(130, 196, 105, 243)
    drawing.arrow(270, 196, 295, 243)
    drawing.text(100, 264, "equal:", color=GREEN)
    drawing.text(100, 284, "the smaller model", size=13)
    drawing.text(300, 264, "different:", color=ORANGE)
    drawing.text(300, 284, "an error, no model", size=13)
    drawing.write("proof")


def cost() -> None:
    drawing = Drawing(
        270, "Cost of a convolution: the product of input width, output width, kernel and positions"
    )
    for x, words, name in (
        (10, "16", "inputs"),
        (110, "32", "outputs"),
        (210, "3 × 3", "kernel"),
        (310, "14 × 14", "positions"),
    ):
        drawing.box(x, 15, 80, 34, words)
        drawing.text(x + 40, 68, name, size=13)
    for x in (100, 200, 300):
        drawing.text(x, 38, "×")
    drawing.text(200, 100, "903,168 MACs; 4,608 params without positions")
    for y, width, words in (
        (125, 360, "dense: 16 → 32"),
        (170, 180, "half of the outputs"),
        (215, 90, "half of both"),
    ):
        drawing.rect(20, y, width, 22, f'fill="{BLUE}"')
        drawing.text(20, y + 38, words, size=13, anchor="start")
    drawing.text(380, 186, "÷ 2", anchor="end")
    drawing.text(380, 231, "÷ 4", anchor="end")
    drawing.write("cost")


def refit() -> None:
    drawing = Drawing(250, "A refit fits the layer that lost an input to its former outputs")
    for y, name, row, gone in ((10, "dense", "0123", ""), (110, "pruned", "0123", "2")):
        drawing.text(20, y + 16, name, anchor="start")
        drawing.channels(20, y + 26, row, gone=gone)
        drawing.arrow(128, y + 38, 166, y + 38)
        drawing.box(168, y + 21, 110, 34, "weights" if y == 10 else "new weights")
        drawing.arrow(280, y + 38, 318, y + 38)
        drawing.box(320, y + 21, 70, 34, "outputs")
    drawing.text(355, 98, "≈", size=24, color=GREEN)
    drawing.text(200, 195, "The inputs that stay take over, as far as they can,")
    drawing.text(200, 217, "what the removed one gave: least squares")
    drawing.text(200, 239, "on calibration inputs, without labels.")
    drawing.write("refit")


def gives() -> None:
    drawing = Drawing(195, "What pruning gives depends on what the network and the data are")
    rows = (
        ("pretrained, few images", "the weights", BLUE),
        ("small, trained from scratch", "the widths", ORANGE),
        ("calls dominate the time", "little time", PINK),
    )
    drawing.text(20, 24, "the network is", size=13, anchor="start", color=LINE)
    drawing.text(380, 24, "pruning gives", size=13, anchor="end", color=LINE)
    for number, (left, right, color) in enumerate(rows):
        y = 40 + 52 * number
        drawing.box(10, y, 380, 42)
        drawing.text(22, y + 26, left, anchor="start")
        drawing.text(378, y + 26, right, anchor="end", color=color)
    drawing.write("gives")


PICTURES = (groups, labels, equivalence, proof, cost, pull, refit, gives)

if __name__ == "__main__":
    for draw in PICTURES:
        draw()
