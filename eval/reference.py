"""Train the reference network, LeNet-5, by the assignment's recipe: plain SGD with learning rate 0.015."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from data import Dataset
from eval.cli import COMMITTED, load_network
from eval.metrics import EVALUATION_BATCH
from models import LeNet5
from pruning import save
from pruning.checkpoint import provenance, read
from pruning.training import TrainConfig, accuracy, fit
from pruning.training.loop import Epoch
from pruning.utils.files import replace_file

#: Epochs of the reference network on MNIST.
REFERENCE_EPOCHS = 6


def train_reference(
    model: LeNet5,
    dataset: Dataset,
    epochs: int,
    batch_size: int,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> LeNet5:
    """Train a LeNet-5 in place by the assignment's recipe."""

    def validate(net: torch.nn.Module) -> float:
        return accuracy(net, dataset.batches("validation", EVALUATION_BATCH))

    batches = dataset.batches("train", batch_size, shuffle=True)
    config = TrainConfig(epochs, lr=0.015, momentum=0.0, schedule="constant")
    fit(model, batches, config, validate=validate, on_epoch=on_epoch, label="LeNet-5")
    return model


def reference_beside(
    path: Path, given: Path | None, dataset: Dataset, device: str, facts: Mapping[str, object]
) -> LeNet5:
    """Return the reference network of a run; copy or train it if the run has none yet.

    Args:
        path: checkpoint of the reference network in the run's folder.
        given: checkpoint to copy; None copies the committed one, or trains a network if that was trained on
            other data.
        dataset: training data.
        device: device of the network.
        facts: provenance to store with a trained network.
    """
    if path.exists():
        return load_network(path, LeNet5, device)
    committed = COMMITTED["LeNet5"]
    if given is None and committed.exists() and read(committed)["provenance"]["dataset"] == dataset.name:
        given = committed
    if given is not None:
        load_network(given, LeNet5, device)
        replace_file(path, given.read_bytes())
    else:
        # On a small data set, train for as many steps as six epochs of MNIST.
        epochs = REFERENCE_EPOCHS * max(1, round(55_000 / len(dataset.train.labels)))
        untrained = LeNet5(image_shape=dataset.image_shape, classes=dataset.classes)
        trained = train_reference(untrained.to(device), dataset, epochs, batch_size=64)
        save(path, trained, provenance=provenance(**facts, epochs=epochs))
    return load_network(path, LeNet5, device)
