"""A data set of ultralytics, drawn on the spot: rectangles and discs on noise, with boxes or outlines."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def drawn_data(
    folder: Path, images: dict[str, int], size: int = 64, outlines: bool = False, seed: int = 0
) -> Path:
    """Write images with one or two objects of two classes, and return the path of data.yaml.

    Args:
        images: number of images by split: train, val.
        outlines: write polygons, for segmentation, instead of boxes.
    """
    random = np.random.default_rng(seed)
    for split, count in images.items():
        for part in ("images", "labels"):
            (folder / part / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = Image.fromarray(random.integers(0, 60, (size, size, 3), dtype=np.uint8))
            lines = [_draw(image, random, size, outlines) for _ in range(1 + i % 2)]
            image.save(folder / "images" / split / f"{i}.png")
            (folder / "labels" / split / f"{i}.txt").write_text("\n".join(lines) + "\n")
    path = folder / "data.yaml"
    path.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n  0: rectangle\n  1: disc\n"
    )
    return path


def _draw(image: Image.Image, random: np.random.Generator, size: int, outlines: bool) -> str:
    """Draw one object, and return its line of the labels."""
    kind, draw = int(random.integers(2)), ImageDraw.Draw(image)
    width, height = random.integers(size // 4, size // 2, 2)
    if kind:
        height = width
    left, top = int(random.integers(size - width)), int(random.integers(size - height))
    box = left, top, left + int(width), top + int(height)
    colour = tuple(int(c) for c in random.integers(120, 256, 3))
    (draw.ellipse if kind else draw.rectangle)(box, fill=colour)
    x, y = (box[0] + box[2]) / 2 / size, (box[1] + box[3]) / 2 / size
    w, h = width / size, height / size
    if not outlines:
        return f"{kind} {x:.5f} {y:.5f} {w:.5f} {h:.5f}"
    if kind:
        turns = [2 * math.pi * k / 12 for k in range(12)]
        points = [(x + w / 2 * math.cos(t), y + h / 2 * math.sin(t)) for t in turns]
    else:
        points = [
            (x - w / 2, y - h / 2),
            (x + w / 2, y - h / 2),
            (x + w / 2, y + h / 2),
            (x - w / 2, y + h / 2),
        ]
    return f"{kind} " + " ".join(f"{a:.5f} {b:.5f}" for a, b in points)
