"""Pruning inside the Trainer of Lightning."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import lightning
import torch
from torch import nn

from pruning.checkpoint import describe
from pruning.errors import PruningError
from pruning.graph.groups import Ignored
from pruning.integrations.in_training import MakePull, TrainingPruner, adopt
from pruning.load_pruned import rebuild
from pruning.planning.budget import Budget
from pruning.planning.options import PlanOptions
from pruning.planning.scores import Score
from pruning.planning.search import DEFAULT_OPTIONS
from pruning.planning.width_sweep import Batch
from pruning.stages.prune import StepSettings
from pruning.utils.modules import copied
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs

#: What a checkpoint of Lightning holds, by name.
Stored: TypeAlias = dict[str, Any]

_LOG = logging.getLogger(__name__)


class PruningCallback(lightning.Callback):
    """Prunes a network of a `LightningModule` after given steps, in equal ratios towards a budget.

    The network keeps its identity and gets the parts of the pruned one; the optimizers keep their momenta
    (`pruning.surgery.transfer`), learning rates and schedules. Checkpoints hold what pruning changed, so
    `fit(ckpt_path=...)` resumes a training with the dense network of the user's code.

    Args:
        budget: limits on the result; percentages refer to the network before training.
        at: numbers of the optimizer steps (`global_step`) after which the network is pruned, ascending.
        example_inputs: to trace the network with.
        network: name of the attribute of the LightningModule that holds the network.
        options, score, calibration, outputs, ignored: see `prune`; options as `PlanOptions`.
        pull: makes what drives channels to 0 until the first pruning, such as `PacedPull` for BatchNorm.

    Raises:
        PruningError: for invalid settings; at the start of the training for several processes, or if the
            module has no such network.

    Example:
        ```python
        callback = PruningCallback(Budget(macs="50%"), at=[500], example_inputs=images, network="model")
        lightning.Trainer(callbacks=[callback]).fit(module, data)
        ```
    """

    def __init__(
        self,
        budget: Budget,
        at: Sequence[int],
        example_inputs: Inputs,
        *,
        network: str = "model",
        options: PlanOptions = DEFAULT_OPTIONS,
        score: Score = "l2",
        calibration: Iterable[Batch] = (),
        outputs: Outputs = None,
        ignored: Iterable[Ignored] = (),
        pull: MakePull | None = None,
    ):
        settings = StepSettings(
            score=score,
            calibration=list(calibration),
            ignored=tuple(ignored),
            options=options,
            outputs=outputs,
        )
        self.pruner = TrainingPruner(budget, at, settings, pull)
        self.example_inputs, self.network = example_inputs, network
        self._pruned_until = 0

    def _network(self, module: nn.Module) -> nn.Module:
        try:
            return module.get_submodule(self.network)
        except AttributeError as error:
            raise PruningError(
                f"{type(module).__name__} has no network {self.network!r}; its parts: "
                f"{', '.join(name for name, _ in module.named_children()) or 'none'}"
            ) from error

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Narrow the dense network to the checkpoint that is resumed; refuse several processes."""
        self._network(pl_module)
        if stage == "fit" and trainer.world_size > 1:
            raise PruningError(
                f"PruningCallback prunes in one process, not {trainer.world_size}; prune before or after a "
                "training of several processes"
            )
        given = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: Stored) -> None:
            narrow(pl_module, checkpoint)
            given(checkpoint)

        # Lightning calls it before it loads the weights; the hook of callbacks comes after that.
        vars(pl_module)["on_load_checkpoint"] = on_load_checkpoint

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Resolve the budget, and start to pull."""
        self.pruner.begin(self._network(pl_module), self.example_inputs, trainer.global_step)
        self._pruned_until = max([n for n in self.pruner.at if n <= trainer.global_step], default=0)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Prune the network and carry the optimizers over, if it is due."""
        step = trainer.global_step
        if step <= self._pruned_until and step in self.pruner.at:
            return  # a batch that accumulates gradients takes no step
        network = self._network(pl_module)
        done = self.pruner.after_step(network, step, trainer.optimizers, owner=pl_module)
        if done is not None:
            self._pruned_until = step
            _LOG.info("step %d: pruned, %s → %s", step, done.before, done.after)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: Stored
    ) -> None:
        """Store the widths of the network, from which the dense one is narrowed."""
        if self._pruned_until:
            described = describe(self._network(pl_module))
            described.pop("state_dict")
            checkpoint["pruning"] = {"network": self.network, **described}

    def state_dict(self) -> Stored:
        """Return the budget as counts, and the cost before pruning."""
        return self.pruner.state()

    def load_state_dict(self, state_dict: Stored) -> None:
        """Continue from what `state_dict` returned."""
        self.pruner.restore(state_dict)


def narrow(module: nn.Module, checkpoint: Stored) -> None:
    """Narrow the network of a LightningModule in place to the widths that a checkpoint holds.

    A checkpoint that was written before the first pruning changes nothing. Make optimizers afterwards.

    Args:
        module: with the dense network. checkpoint: content of the file, as torch.load returns it.

    Example:
        ```python
        checkpoint = torch.load("last.ckpt", weights_only=False)
        module = Classifier()
        narrow(module, checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        ```
    """
    stored = checkpoint.get("pruning")
    if stored is None:
        return
    prefix = f"{stored['network']}."
    state = {
        key.removeprefix(prefix): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix)
    }
    network = module.get_submodule(stored["network"])
    small = copied(network)
    with torch.no_grad():
        rebuild(small, {**stored, "state_dict": state})
    adopt(network, small)
