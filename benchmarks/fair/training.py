"""Train the parts of a cell so that each part, once interrupted, goes on from its last epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
from benchmarks.fair.cells import WHOLE, Cell, locked
from benchmarks.fair.recipes import Recipe, network
from eval.metrics import EVALUATION_BATCH
from pruning import Budget, load, save
from pruning.checkpoint import write
from pruning.planning import Cost
from pruning.planning.cost import deployed_cost
from pruning.training import TrainConfig, accuracy, cross_entropy, fit
from pruning.training.image_batches import Augment, ImageBatches, cutout, in_turn, random_mirror, random_shift
from pruning.utils.files import read_plain

#: Added to the seed of training after pruning, so that its batches differ from those of the dense network.
LATER = 1000

Loss = Callable[[nn.Module, Any, Any], Tensor]


@dataclass(frozen=True)
class Workshop:
    """What all cells of a network share.

    Attributes:
        network: name of the network.
        source: the data set on the device of the training.
        source_key: a short name of the data set and the part of it that is used.
        runs: folder of the parts that are being trained.
    """

    network: str
    recipe: Recipe
    source: data.Dataset
    source_key: str
    runs: Path
    device: str = "cpu"

    @cached_property
    def batches(self) -> ImageBatches:
        """The training batches, shifted and, if they have colors, mirrored."""
        steps: list[Augment] = [random_shift(4)]
        if self.source.image_shape[0] == 3:
            steps.append(random_mirror())
        if self.recipe.cutout:
            steps.append(cutout(self.recipe.cutout, self.source.mean))
        return self.source.batches("train", self.recipe.batch_size, shuffle=True, augment=in_turn(*steps))

    @cached_property
    def validation(self) -> ImageBatches:
        return self.source.batches("validation", EVALUATION_BATCH)

    @cached_property
    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """The batches for scores."""
        return self.source.calibration()

    @cached_property
    def example(self) -> Tensor:
        """Two images, for traces."""
        return self.calibration[0][0][:2]

    def validate(self, model: nn.Module) -> float:
        return accuracy(model, self.validation)

    def loss(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """The cross entropy, with the forward pass in bfloat16 if the recipe says so."""
        if not self.recipe.bf16:
            return cross_entropy(model, inputs, targets)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return cross_entropy(model, inputs, targets)

    def new(self, seed: int) -> nn.Module:
        """Return the dense network with the first weights of a seed."""
        torch.manual_seed(seed)
        return network(self.network, self.source.image_shape, self.source.classes).to(self.device)

    def load(self, path: Path) -> nn.Module:
        """Return the network of a file, which may be narrower than the dense one."""
        return load(path, lambda: self.new(0), device=self.device)

    def budget(self, share: str, dense: nn.Module) -> Budget:
        """Return a budget of MACs as counts."""
        return Budget(macs=share).resolve(self.cost(dense))

    def cost(self, model: nn.Module) -> Cost:
        return deployed_cost(model, self.example)

    def folder(self, method: str, budget: str, seed: int) -> Path:
        cell = Cell(self.network, method, budget, seed)
        return cell.folder(self.runs, self.recipe, self.source_key)

    def dense(self, seed: int) -> nn.Module:
        """Return the trained dense network of a seed, which is trained once for all cells."""
        return self._shared("dense", seed, self.loss)

    def dense_with(self, kind: str, seed: int, loss: Loss) -> nn.Module:
        """Return a dense network that was trained with another loss, once for all budgets."""
        return self._shared(f"dense, {kind}", seed, loss)

    def _shared(self, name: str, seed: int, loss: Loss) -> nn.Module:
        folder = self.folder(name, WHOLE, seed)
        with locked(folder, wait=True):
            return Part(self, folder / "trained").learn(
                lambda: self.new(seed), self.recipe.dense_epochs, self.recipe.rate, seed, loss=loss
            )


class Part:
    """A part of a training whose network, once trained, is in `PATH.pth`.

    Before it is complete, `PATH.start.pth` holds the network that it began with, and `PATH.state` the
    state after its last epoch. Both are removed in the end.
    """

    def __init__(self, workshop: Workshop, path: Path):
        self.workshop, self.path = workshop, path

    def learn(
        self,
        make: Callable[[], nn.Module],
        epochs: int,
        rate: float,
        seed: int,
        *,
        loss: Loss | None = None,
        keep_best: bool = False,
        before_epoch: Callable[[nn.Module], None] | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
    ) -> nn.Module:
        """Train the network that `make` returns, or load it if that has been done.

        Args:
            seed: seed of the order of images and of their augmentation.
            keep_best: keep the epoch that is best on the validation split instead of the last.
            before_epoch, after_step: functions called with the network.
        """
        done, begun, state = (self._file(suffix) for suffix in (".pth", ".start.pth", ".state"))
        if done.exists():
            return self._load(done)
        if begun.exists():
            model = self._load(begun)
        else:
            model = make()
            save(begun, model)
        config = self.workshop.recipe.training(epochs, rate)
        self._fit(model, config, state, seed, loss, keep_best, before_epoch, after_step)
        save(done, model)
        for leftover in (begun, state):
            leftover.unlink(missing_ok=True)
        return model

    def _fit(
        self,
        model: nn.Module,
        config: TrainConfig,
        state: Path,
        seed: int,
        loss: Loss | None,
        keep_best: bool,
        before_epoch: Callable[[nn.Module], None] | None,
        after_step: Callable[[nn.Module], None] | None,
    ) -> None:
        torch.manual_seed(seed)
        fit(
            model,
            self.workshop.batches,
            config,
            loss=loss or self.workshop.loss,
            validate=self.workshop.validate if keep_best else None,
            keep_best=keep_best,
            before_epoch=None if before_epoch is None else lambda _: before_epoch(model),
            after_step=None if after_step is None else lambda _: after_step(model),
            on_epoch=lambda epoch: write(state, dict(epoch.state())),
            label=self.path.parent.name,
            resume=read_plain(state) if state.exists() else None,
        )

    def _file(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _load(self, path: Path) -> nn.Module:
        return self.workshop.load(path)
