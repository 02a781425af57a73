"""Inputs of a user for the command line: a module with networks and data, folders of images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

MODULE = Path(__file__).with_name("mine.py").read_text()
NET = ("--model", "mine:Net", "--data", "mine:digits")


def image_folder(root, classes, size=24):
    """Write twelve images of different shades for each class, in one folder per class."""
    for name in classes:
        for i in range(12):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = (len(name) * 37 + 5 * i) % 256
            Image.new("RGB", (size, size), (shade, 255 - shade, 60)).save(path)
