"""How images become the inputs of a network, which checkpoints record, and the names of splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pruning.errors import PruningError

#: Mean and standard deviation of the pixels, as torchvision's pretrained networks expect them.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Names of the splits of data, as folders or as keys of what a factory returns.
SPLITS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}

#: What `augment` may be, each with its description.
AUGMENTATIONS = {
    "crop": "random crops of 8 to 100 % of the area, and flips",
    "flip": "random flips",
    "none": "as the others",
}


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs: resize, crop the center, scale to 0 to 1, subtract `mean`, divide by `std`.

    Attributes:
        resize: length of the shorter side, in pixels.
        crop: height and width of the central crop, in pixels.
        mean, std: mean and standard deviation of each channel.
        augment: how training images vary, a key of `AUGMENTATIONS`.

    Raises:
        PruningError: there are not three means and standard deviations, a mean is not from 0 to 1, or the
            crop is above `resize`.

    >>> Preprocessing(resize=73, crop=64).augment
    'crop'
    """

    resize: int
    crop: int
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    augment: str = "crop"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise PruningError("--mean and --std of images: give three numbers each, for red, green and blue")
        if not all(0 <= mean <= 1 for mean in self.mean):
            given = " ".join(f"{mean:g}" for mean in self.mean)
            raise PruningError(
                f"--mean {given}: expected numbers from 0 to 1, because pixels are scaled to 0 to 1 first; "
                "divide --mean and --std of pixels up to 255 by 255"
            )
        if self.crop > self.resize:
            raise PruningError(
                f"--crop {self.crop} is above --resize {self.resize}, which is the shorter side of the image "
                "that is cropped: give a larger --resize"
            )

    @classmethod
    def of_size(cls, size: int) -> Preprocessing:
        """Return the preprocessing of torchvision's pretrained networks, for inputs of another size."""
        return cls(resize=round(size * 8 / 7), crop=size)

    @classmethod
    def chosen(cls, flags: Mapping[str, Any], stored: Mapping[str, Any] | None) -> Preprocessing:
        """Return what flags choose; what they do not give is as a checkpoint stores it, or the default.

        Args:
            flags: values of resize, crop, mean, std and augment; None where a flag is not given.
            stored: what `to_json` returned.
        """
        given = {key: value for key, value in flags.items() if value is not None}
        if "crop" in given and "resize" not in given:
            given["resize"] = round(given["crop"] * 8 / 7)
        base = asdict(cls.of_size(224)) | dict(stored or {}) | given
        return cls(**{**base, "mean": _by_channel(base["mean"]), "std": _by_channel(base["std"])})

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:g}" for value in each) for each in (self.mean, self.std))
        return (
            f"shorter side resized to {self.resize}, center cropped to {self.crop} x {self.crop}, "
            f"mean {mean}, std {std}; training images: {AUGMENTATIONS[self.augment]}"
        )


def _by_channel(values: Sequence[float]) -> tuple[float, ...]:
    """One number stands for all three channels."""
    return tuple(values) * 3 if len(values) == 1 else tuple(values)
