"""Models and data that a command line names: factories, torchvision's networks and data sets, folders."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from pruning.checkpoint import read, restore
from pruning.errors import CheckpointError, PruningError
from pruning.training.batches import BatchSource, first_batch, length
from pruning.utils.files import read_plain
from pruning.utils.tree import first_examples, tensors

#: torchvision's data sets by name: class, mean and standard deviation of the training pixels.
BUILT_IN: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ("MNIST", (0.1307,), (0.3081,)),
    "fashion-mnist": ("FashionMNIST", (0.2860,), (0.3530,)),
    "kmnist": ("KMNIST", (0.1918,), (0.3483,)),
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

#: Of other images, as torchvision's pretrained networks expect them.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: What DistributedDataParallel, torch.compile and Lightning put before the names of weights.
PREFIXES = ("", "module.", "_orig_mod.", "model.")

#: Files of the modules that factories were found in.
USERS: set[str] = set()

#: So many examples of one class and none of another are no accident.
FEW = 64

#: Names of the splits: folders of an image folder, keys of what a factory gives.
SPLITS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class Data:
    """Batches of (inputs, targets): to train on, to choose by, and to report on.

    `test` is None where there is no split for it.
    """

    name: str
    train: BatchSource
    validation: BatchSource
    test: BatchSource | None = None

    @property
    def examples(self) -> Any:
        """The first two inputs of the validation split, to trace with."""
        inputs, _ = first_batch(self.validation)
        return first_examples(inputs, 2)

    def calibration(self, examples: int) -> list[tuple[Any, Any]]:
        """Training batches that hold so many examples, or all.

        Raises `PruningError` where they are enough to tell, and all of one class.
        """
        batches: list[tuple[Any, Any]] = []
        count = 0
        for batch in self.train:
            batches.append(batch)
            count += len(tensors(batch[0])[0])
            if count >= examples:
                break
        if not isinstance(self.train, _Loader):  # which draws at random from several classes
            _require_several_classes(self.name, [targets for _, targets in batches])
        return batches


def factory(name: str) -> Callable[..., Any]:
    """What a name stands for: `package.module:factory`, or one of torchvision's classifiers.

    Raises `PruningError` when there is no such thing; it says what is near.
    """
    if ":" not in name:
        models = _torchvision().models
        names = models.list_models()
        if name not in names:
            raise PruningError(
                f"model {name!r} is none of torchvision's{_near(name, names)}; your own is "
                "package.module:factory"
            )
        return lambda **arguments: models.get_model(name, **arguments)
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise PruningError(f"{name!r}: expected package.module:factory, such as mine:Net")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # of the user's module
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise PruningError(f"{name!r}: module {module_name!r} cannot be imported: {kind}{error}") from error
    USERS.add(getattr(found, "__file__", None) or "")
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PruningError(
                f"{name!r}: {module_name} has no {attribute!r}{_near(attribute, list(vars(found)))}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise PruningError(f"{name!r} is a {type(found).__name__}, a function or class was expected")
    return found


def make_model(name: str, arguments: Mapping[str, Any], weights: str | Path | None = None) -> nn.Module:
    """A network by the name of its factory, with weights from a file where there is one.

    Args:
        weights: a state dict, or a checkpoint of this toolkit, which may be of the pruned network.

    Raises `PruningError` when the factory fails or gives no module, `CheckpointError` when the
    weights do not fit.
    """
    model = _made(name, factory(name), arguments)
    if not isinstance(model, nn.Module):
        raise PruningError(f"{name!r} gave a {type(model).__name__}, an nn.Module was expected")
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Give a model the weights of a file, in place; a pruned one gets its widths, too."""
    content = read_plain(path)
    kind = type(model).__name__
    if isinstance(content, dict) and "format" in content:
        return restore(path, model, read(path))
    for key in ("state_dict", "model_state_dict", "model"):  # as training scripts wrap it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict: names with tensors were expected")
    known = model.state_dict().keys()
    without = {prefix: {key.removeprefix(prefix): t for key, t in content.items()} for prefix in PREFIXES}
    try:
        model.load_state_dict(next((s for s in without.values() if s.keys() == known), without["module."]))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(f"{path} does not fit {kind}: {' '.join(lines[1:3])[:300]}") from error


def make_data(
    name: str,
    *,
    folder: str | Path = "data",
    batch_size: int = 64,
    image_size: int = 224,
    workers: int = 0,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Data:
    """Data by name.

    Args:
        name: one of `BUILT_IN`; a folder in the layout of torchvision's `ImageFolder` with a
            subfolder a class, itself or in `train`, `val` and `test`; or `module:factory`.
            A factory is called with the arguments, and `batch_size` where it takes one, and
            gives two or three of train, validation and test batches, in this order or by
            these names.
        folder: where data sets lie, or are downloaded to.
        batch_size: examples a batch, of names and folders.
        image_size: height and width to which a folder's images are brought.
        workers: processes that read images. seed: of the validation split, where one is made.

    Raises `PruningError` when there is no such data, or it has one class only.
    """
    if ":" in name and not Path(name).exists():
        given = dict(arguments or {})
        make = factory(name)
        if "batch_size" in inspect.signature(make).parameters:
            given.setdefault("batch_size", batch_size)
        return _from_factory(name, _made(name, make, given))
    if name in BUILT_IN:
        sets, apart = _built_in(name, folder), False
    elif Path(name).is_dir():
        sets, apart = _image_folder(Path(name), image_size)
    else:
        raise PruningError(
            f"data {name!r} is neither a folder, nor module:factory, nor one of {', '.join(BUILT_IN)}"
            f"{_near(name, list(BUILT_IN))}"
        )
    _require_classes(name, sets)
    if not apart:
        order = torch.randperm(len(sets["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, len(order) // 10)
        sets["train"] = Subset(sets["train"], order[held_out:])
        sets["validation"] = Subset(sets["validation"], order[:held_out])
    loaders = {
        split: _Loader(
            images,
            batch_size,
            shuffle=split == "train",
            num_workers=workers,
            drop_last=split == "train" and len(images) > batch_size,
            persistent_workers=workers > 0,
        )
        for split, images in sets.items()
    }
    return Data(name, **loaders)


def _built_in(name: str, folder: str | Path) -> dict[str, Any]:
    """One of torchvision's data sets; its training images stand for those of validation, too."""
    transforms = _torchvision().transforms
    kind, mean, std = BUILT_IN[name]
    plain = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    moved = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    varied = moved if name.startswith("cifar") else []
    return {
        "train": _download(kind, folder, True, transforms.Compose([*varied, *plain])),
        "validation": _download(kind, folder, True, transforms.Compose(plain)),
        "test": _download(kind, folder, False, transforms.Compose(plain)),
    }


def _image_folder(root: Path, size: int) -> tuple[dict[str, Any], bool]:
    """The splits of an image folder, and whether that of validation is a folder of its own."""
    transforms = _torchvision().transforms
    from pruning.cli.image_folder import Pictures, read_image  # which needs torchvision

    plain = [transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    still = [transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size), *plain]
    varied = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *plain]
    places = _split_folders(root)
    sets = {}
    for split, place in places.items():
        recipe = transforms.Compose(varied if split == "train" else still)
        try:
            sets[split] = Pictures(str(place), recipe, loader=read_image)
        except FileNotFoundError as error:
            raise PruningError(f"{place} is no image folder: {error}") from error
    return sets, places["validation"] != places["train"]


class _Loader(DataLoader[Any]):
    """Says in one line what went wrong in a process that reads images; torch adds its traceback."""

    def __iter__(self) -> Any:
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


def _torchvision() -> Any:
    try:
        import torchvision
    except ImportError as error:
        raise PruningError(f"torchvision is needed for this: pip install torchvision ({error})") from error
    return torchvision


def _download(kind: str, folder: str | Path, train: bool, transform: Any) -> Any:
    datasets = _torchvision().datasets
    try:
        return getattr(datasets, kind)(str(folder), train=train, transform=transform, download=True)
    except Exception as error:  # whatever a failing download raises
        raise PruningError(
            f"{kind} is not in {folder} and cannot be downloaded ({error}); put it there, or name "
            "another folder"
        ) from error


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of a folder's splits; train and validation are one where they are not apart."""
    places = [place for place in sorted(root.iterdir()) if place.is_dir() and place.name[0] != "."]
    folders = {place.name.lower(): place for place in places}
    found = {split: folders[name] for split, names in SPLITS.items() for name in names if name in folders}
    if "train" not in found:
        if found and len(found) == len(folders):
            there = " and ".join(place.name for place in found.values())
            raise PruningError(f"{root} has {there}, which are splits, but no train beside them")
        return {"train": root, "validation": root}
    return {"validation": found["train"], **found}


def _require_several_classes(name: str, targets: Sequence[Any]) -> None:
    """What examples of one class say of channels is said of that class alone."""
    if not all(isinstance(t, Tensor) and t.ndim == 1 and not t.is_floating_point() for t in targets):
        return  # not one class an example
    found = torch.cat(list(targets)) if targets else torch.empty(0)
    if len(found) >= FEW and bool((found == found[0]).all()):
        raise PruningError(
            f"data {name!r}: the first {len(found):,} training examples are all of class {int(found[0])}; "
            "shuffle the training batches, or give at least two classes"
        )


def _require_classes(name: str, sets: Mapping[str, Any]) -> None:
    classes = getattr(sets["train"], "classes", None)
    if classes is not None and len(classes) < 2:
        raise PruningError(
            f"data {name!r} has one class only ({', '.join(map(str, classes))}): at least two are needed"
        )
    for split, images in sets.items():
        if classes is not None and getattr(images, "classes", classes) != classes:
            raise PruningError(
                f"data {name!r}: the classes of {split} differ from those of train "
                f"({len(images.classes)} and {len(classes)})"
            )


def _from_factory(name: str, made: Any) -> Data:
    if isinstance(made, Mapping):
        made = [next((made[n] for n in names if n in made), None) for names in SPLITS.values()]
    if isinstance(made, Data):
        return made
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
    return Data(name, *made)


def _made(name: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a factory of the user's gives."""
    try:
        return make(**arguments)
    except PruningError:
        raise
    except Exception as error:  # of the user's code
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise PruningError(f"{name}({given}) failed: {type(error).__name__}: {error}") from error


def arguments_of(texts: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; values are Python literals, or else text."""
    found = {}
    for text in texts:
        key, given, value = text.partition("=")
        if not given or not key.isidentifier():
            raise PruningError(f"argument {text!r}: expected KEY=VALUE")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _near(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 3)
    return f" (did you mean {', '.join(close)}?)" if close else ""
