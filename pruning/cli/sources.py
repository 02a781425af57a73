"""Data that a command line names: torchvision's data sets, image folders, factories."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from pruning.cli.argument_types import nearest_path
from pruning.cli.factories import factory, made_by, similar, torchvision_module, users_code
from pruning.cli.named_images import BUILT_IN, TILED, named_images
from pruning.cli.preprocessing import SPLITS, Preprocessing
from pruning.errors import PruningError
from pruning.training.batches import BatchSource, first_batch, length
from pruning.training.image_batches import Augment, ImageBatches, cutout, in_turn, random_mirror, random_shift
from pruning.utils.batch import usual_batch
from pruning.utils.tree import Inputs
from pruning.utils.wording import number_of

#: A batch of (inputs, targets).
Batch: TypeAlias = tuple[Inputs, object]

#: Most names of classes in a line.
SHOWN = 10

#: From this many examples on, all of one class, the batches are taken to be sorted by class.
FEW = 64


@dataclass(frozen=True)
class Data:
    """Batches of (inputs, targets): to train on, to choose by, and to report on.

    `test` is None where there is no test split, `preprocessing` where these are no images of a folder.
    `classes` are the names of the classes where the data says them.
    """

    name: str
    train: BatchSource
    validation: BatchSource
    test: BatchSource | None = None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = ()

    def __str__(self) -> str:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        sizes = [
            f"{len(cast(Sized, b.dataset)):,} {split}"
            for split, b in splits.items()
            if isinstance(b, _Loader)
        ]
        shown = ", ".join(self.classes[:SHOWN]) + (", ..." if len(self.classes) > SHOWN else "")
        classes = f"{number_of(len(self.classes), 'class')} ({shown})"
        return f"{self.name}: {classes}, {', '.join(sizes)} images; {self.preprocessing}"

    @property
    def examples(self) -> Inputs:
        """The inputs of the first validation batch."""
        return first_batch(self.validation)[0]

    def calibration(self, examples: int) -> list[Batch]:
        """Return training batches that hold at least this many examples, or all.

        Raises:
            PruningError: there are many examples, all of one class.
        """
        batches: list[Batch] = []
        count = 0
        for batch in self.train:
            batches.append(batch)
            count += usual_batch(batch[0]).size
            if count >= examples:
                break
        if not isinstance(self.train, (_Loader, ImageBatches)):  # which draws at random from several classes
            _require_several_classes(self.name, [targets for _, targets in batches])
        return batches


def make_data(
    name: str,
    *,
    folder: str | Path = "data",
    batch_size: int = 64,
    image_size: int = 224,
    preprocessing: Preprocessing | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    cutout_side: int = 0,
    workers: int = 0,
    seed: int = 0,
    device: str = "cpu",
    arguments: Mapping[str, object] | None = None,
) -> Data:
    """Return data by name.

    Args:
        name: one of `BUILT_IN`; a folder in the layout of torchvision's `ImageFolder` with one
            subfolder per class, itself or in `train`, `val` and `test`; or `module:factory`.
            A factory is called with the arguments, and `batch_size` where it takes one, and
            returns two or three of train, validation and test batches, in this order or by
            these names.
        folder: where data sets are, or are downloaded to (see `named_images`).
        batch_size: examples per batch, of named data sets and folders.
        image_size: height and width to which a folder's images are cropped, in pixels.
        preprocessing: of a folder's images; by default that of `image_size`.
        normalization: mean and standard deviation of the pixels of named data sets, by channel; by
            default those of `BUILT_IN`.
        cutout_side: side of the square that `cutout` blanks in training images of named data sets, in
            pixels; 0 for none.
        workers: processes that read images of a folder.
        seed: seed of the validation split, where one is made.
        device: where named data sets are held; memory of other batches is pinned for a GPU.
        arguments: keyword arguments of the factory.

    Raises:
        PruningError: there is no such data, or it has one class only.
    """
    if ":" in name and not Path(name).exists():
        given = dict(arguments or {})
        make = factory(name)
        if "batch_size" in inspect.signature(make).parameters:
            given.setdefault("batch_size", batch_size)
        return _from_factory(name, made_by(name, make, given))
    if name in BUILT_IN:
        return _built_in(name, folder, batch_size, normalization, cutout_side, seed, device)
    if not Path(name).is_dir():
        near = similar(name, list(BUILT_IN)) or nearest_path(name)
        raise PruningError(
            f"data {name!r} is {'a file, ' if Path(name).exists() else ''}neither a folder, nor "
            f"module:factory, nor one of {', '.join(BUILT_IN)}{near}"
        )
    chosen = preprocessing or Preprocessing.of_size(image_size)
    return _of_folder(name, chosen, batch_size, workers, seed, device)


def _of_folder(
    name: str, chosen: Preprocessing, batch_size: int, workers: int, seed: int, device: str
) -> Data:
    """Data of an image folder."""
    torchvision_module()
    from pruning.cli.image_folder import image_folder  # which needs torchvision

    found, separate = image_folder(Path(name), chosen)
    sets: dict[str, Dataset[Batch]] = dict(found)
    _require_classes(name, sets)
    classes = shown_classes(sets["train"])
    if not separate:
        _hold_out_validation(sets, seed)
    loaders = {split: _loader(split, images, batch_size, workers, device) for split, images in sets.items()}
    return Data(name, **loaders, preprocessing=chosen, classes=classes)


def shown_classes(images: object) -> tuple[str, ...]:
    """Return the names of the classes of a data set, if it has any; MNIST calls them "0 - zero"."""
    while not hasattr(images, "classes") and hasattr(images, "dataset"):
        images = images.dataset
    names = getattr(images, "classes", None)
    return shown_names(names) if isinstance(names, Sequence) and not isinstance(names, str) else ()


def shown_names(names: Sequence[object]) -> tuple[str, ...]:
    """Return names of classes as they are shown."""
    return tuple(str(i) if str(name).startswith(f"{i} - ") else str(name) for i, name in enumerate(names))


def number_of_classes(name: str) -> int | None:
    """Return how many classes named data has, or an image folder, without reading it; None for others."""
    if name in BUILT_IN:
        return BUILT_IN[name].classes
    if ":" in name or not Path(name).is_dir():
        return None
    torchvision_module()
    from pruning.cli.image_folder import class_names  # which needs torchvision

    return len(class_names(Path(name))) or None


def _validation_split(examples: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the places of the training examples to train on, and of the tenth to validate on."""
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, examples // 10)
    return order[held_out:], order[:held_out]


def _hold_out_validation(sets: dict[str, Dataset[Batch]], seed: int) -> None:
    """Make a tenth of the training images the validation split, in place."""
    learned, held_out = _validation_split(_size(sets["train"]), seed)
    sets["train"] = Subset(sets["train"], learned)
    sets["validation"] = Subset(sets["validation"], held_out)


def _loader(split: str, images: Dataset[Batch], batch_size: int, workers: int, device: str) -> _Loader:
    return _Loader(
        images,
        batch_size,
        shuffle=split == "train",
        num_workers=workers,
        drop_last=split == "train" and _size(images) > batch_size,
        # Workers that persist would go on with random numbers that a resumed run does not know.
        persistent_workers=False,
        pin_memory=device.startswith("cuda"),
    )


def _built_in(
    name: str,
    folder: str | Path,
    batch_size: int,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
    cut: int,
    seed: int,
    device: str,
) -> Data:
    """One of the named data sets, in memory; CIFAR is shifted and mirrored in training."""
    known = BUILT_IN[name]
    mean, std = normalization or (known.mean, known.std)
    if {len(mean), len(std)} != {len(known.mean)}:
        raise PruningError(f"--mean and --std of {name}: expected {len(known.mean)} each, one for a channel")
    found = named_images(name, folder)
    images, labels = found.train
    augment: list[Augment] = [random_shift(4), random_mirror()] if name in TILED else []
    augment += [cutout(cut, mean)] if cut else []
    learned, held_out = _validation_split(len(labels), seed)

    def batches(pixels: Tensor, targets: Tensor, trains: bool = False) -> ImageBatches:
        pixels, targets = pixels.to(device), targets.to(device)
        varied = in_turn(*augment) if trains and augment else None
        return ImageBatches(
            pixels, targets, batch_size, mean, std, shuffle=trains, drop_last=trains, augment=varied
        )

    return Data(
        name,
        batches(images[learned], labels[learned], trains=True),
        batches(images[held_out], labels[held_out]),
        batches(*found.test),
        classes=shown_names(found.classes),
    )


class _Loader(DataLoader[Batch]):
    """Say in one line what went wrong in a process that reads images; torch adds its traceback."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except PruningError as error:
                said = str(error).strip().splitlines()[-1]
                raise PruningError(said.removeprefix(f"{PruningError.__module__}.PruningError: ")) from error
            yield batch


class _UsersBatches:
    """Batches of a user's factory: an error while they are read is reported as one of the user's code."""

    def __init__(self, name: str, batches: BatchSource):
        self.name, self.batches = name, batches
        self.dataset = getattr(batches, "dataset", None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        reading = f"data {self.name!r} cannot be read"
        with users_code(reading):
            batches = iter(self.batches)
        while True:
            with users_code(reading):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def _size(images: Dataset[Batch]) -> int:
    return len(cast(Sized, images))


def _require_several_classes(name: str, targets: Sequence[object]) -> None:
    """Refuse examples of one class only: scores taken on them hold for that class alone."""
    classes = [t for t in targets if isinstance(t, Tensor) and t.ndim == 1 and not t.is_floating_point()]
    if len(classes) < len(targets):
        return  # not one class per example
    found = torch.cat(classes) if classes else torch.empty(0)
    if len(found) >= FEW and bool((found == found[0]).all()):
        raise PruningError(
            f"data {name!r}: the first {len(found):,} training examples are all of class {int(found[0])}; "
            "shuffle the training batches, or give at least two classes"
        )


def _require_classes(name: str, sets: Mapping[str, Dataset[Batch]]) -> None:
    classes: list[str] | None = getattr(sets["train"], "classes", None)
    if classes is None:
        return
    if len(classes) < 2:
        raise PruningError(
            f"data {name!r} has one class only ({', '.join(map(str, classes))}): at least two are needed, "
            f"{name}/CLASS/*.jpg each"
        )
    for split, images in sets.items():
        others: list[str] = getattr(images, "classes", classes)
        if others != classes:
            lacks = f"it lacks {_listed(set(classes) - set(others))}" if set(classes) - set(others) else ""
            more = f"train lacks {_listed(set(others) - set(classes))}" if set(others) - set(classes) else ""
            raise PruningError(
                f"data {name!r}: the classes of {split} differ from those of train ({len(others)} and "
                f"{len(classes)}): {' and '.join(filter(None, (lacks, more)))}. Each split needs a "
                "folder with images for every class"
            )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _from_factory(name: str, made: object) -> Data:
    if isinstance(made, Data):
        made = made.train, made.validation, made.test
    if isinstance(made, Mapping):
        made = [next((made[n] for n in names if n in made), None) for names in SPLITS.values()]
    if not isinstance(made, Sequence) or not 2 <= len(made) <= 3 or made[0] is None or made[1] is None:
        raise PruningError(
            f"{name!r} gave a {type(made).__name__}: two or three of train, validation and test batches were "
            "expected"
        )
    for split, batches in zip(("train", "validation", "test"), made, strict=False):
        if batches is not None and length(batches) is None:
            raise PruningError(f"{name!r}: the {split} batches have no length; give a list or a DataLoader")
        if batches is not None and not length(batches):
            raise PruningError(f"{name!r} gave no {split} batches; is the batch size above the split's?")
        if isinstance(batches, Iterator):
            raise PruningError(
                f"{name!r}: the {split} batches are an iterator, which can be read only once; give a list or "
                "a DataLoader"
            )
    train, validation, *rest = (None if each is None else _UsersBatches(name, each) for each in made)
    assert train is not None and validation is not None
    return Data(name, train, validation, rest[0] if rest else None, classes=shown_classes(made[0]))
