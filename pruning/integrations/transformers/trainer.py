"""Pruning inside the Trainer of transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Ignored
from pruning.integrations.in_training import MakePull, TrainingPruner
from pruning.integrations.transformers.adapting import adapted
from pruning.integrations.transformers.fitting import ConfigFit
from pruning.integrations.transformers.inputs import example_inputs as inputs_for
from pruning.integrations.transformers.inputs import without_cache
from pruning.planning.budget import Budget
from pruning.planning.options import PlanOptions
from pruning.planning.scores import Score
from pruning.planning.search import DEFAULT_OPTIONS
from pruning.planning.width_sweep import Batch
from pruning.stages.prune import StepSettings
from pruning.training.output_comparison import soft_loss
from pruning.utils.modules import copied
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs

_LOG = logging.getLogger(__name__)

#: The entry of a configuration that keeps the budget of a training which is resumed.
_KEY = "pruning"


class PruningCallback(transformers.TrainerCallback):
    """Prunes the model of a `Trainer` after given steps, in equal ratios towards a budget.

    The Trainer keeps its model, optimizer and schedule: the model gets the parts of the pruned one, and the
    optimizer its momenta (`pruning.surgery.transfer`). Where a configuration describes the pruned model, the
    model has it from then on, so checkpoints of the Trainer load by `from_pretrained`; `loadable` gives the
    constraints. To resume, give the Trainer the model that `from_pretrained` loads from the checkpoint.

    Args:
        budget: limits on the result; percentages refer to the model before training.
        at: numbers of the optimizer steps after which the model is pruned, ascending.
        example_inputs: to trace the model with; made from its configuration by default.
        options: constraints of each plan: `PlanOptions(**loadable(model, traced))`.
        score, calibration, outputs, ignored: see `prune`.
        distill: weight of the dense model's logits in the loss, 0 to 1; `temperature` divides the logits.
        pull: makes what drives channels to 0 until the first pruning, such as `PacedPull` for BatchNorm.

    Raises:
        PruningError: for invalid settings, and at the start of the training for several processes.

    Example:
        ```python
        callback = PruningCallback(Budget(macs="60%"), at=[100, 200], distill=0.5)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        ```
    """

    def __init__(
        self,
        budget: Budget,
        at: Sequence[int],
        *,
        example_inputs: Inputs | None = None,
        options: PlanOptions = DEFAULT_OPTIONS,
        score: Score = "l2",
        calibration: Iterable[Batch] = (),
        outputs: Outputs = None,
        ignored: Iterable[Ignored] = (),
        distill: float = 0.0,
        temperature: float = 4.0,
        pull: MakePull | None = None,
    ):
        if not 0 <= distill <= 1:
            raise PruningError(f"distill={distill}: expected the weight of the teacher's logits, 0 to 1")
        if temperature <= 0:
            raise PruningError(f"temperature={temperature}: expected a number above 0")
        settings = StepSettings(
            score=score,
            calibration=list(calibration),
            ignored=tuple(ignored),
            options=options,
            outputs=outputs,
        )
        self.pruner = TrainingPruner(budget, at, settings, pull)
        self.example_inputs, self.distill, self.temperature = example_inputs, distill, temperature
        self._remove: Callable[[], None] = lambda: None

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Resolve the budget, start to pull, and set up the teacher."""
        if args.world_size > 1 or not isinstance(model, transformers.PreTrainedModel):
            raise PruningError(
                f"PruningCallback prunes a PreTrainedModel in one process, not {type(model).__name__} in "
                f"{args.world_size}: wrappers of several processes hold the dense weights; prune "
                "before or after such a training"
            )
        inputs = inputs_for(model) if self.example_inputs is None else self.example_inputs
        stored = getattr(model.config, _KEY, None)
        if state.global_step and isinstance(stored, Mapping):
            self.pruner.restore(stored)
        self.pruner.begin(model, without_cache(model, inputs), state.global_step)
        setattr(model.config, _KEY, self.pruner.state())
        if self.distill:
            teacher = copied(model).eval().requires_grad_(False)
            self._add_teacher(model, teacher)

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Prune the model and carry the optimizer over, if it is due."""
        while hasattr(optimizer, "optimizer"):  # of Accelerate
            optimizer = optimizer.optimizer
        if state.global_step not in self.pruner.at:
            self.pruner.after_step(model, state.global_step, [optimizer])
            return
        remove, self._remove = self._remove, lambda: None
        remove()

        def convert(small: nn.Module) -> nn.Module:
            return self._described(model, small)

        done = self.pruner.after_step(model, state.global_step, [optimizer], convert)
        assert done is not None
        if self.distill:
            self._add_teacher(model, self._teacher)
        _LOG.info("step %d: pruned, %s → %s", state.global_step, done.before, done.after)

    def on_train_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **_: Any,
    ) -> None:
        """Remove the teacher."""
        self._remove()

    def _described(self, model: Any, small: nn.Module) -> nn.Module:
        """Give the pruned model the configuration that describes it, if there is one; return the model."""
        configs, reason = ConfigFit(model).configs(small)
        for config in configs:
            made, _, reason = adapted(small, config, self.pruner.example_inputs, self.pruner.settings.outputs)
            if made is not None:
                _state_as(small, made)
                return small
        _LOG.warning(
            "from_pretrained cannot load checkpoints from here on: %s. Prune under the constraints of "
            "`loadable`, or save the model with save_pretrained of pruning.integrations.transformers",
            reason,
        )
        return small

    def _add_teacher(self, model: nn.Module, teacher: nn.Module) -> None:
        """Add the teacher's logits to the loss of the model's outputs in training."""
        self._teacher = teacher
        weight, temperature = self.distill, self.temperature

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not module.training or not torch.is_grad_enabled():
                return output
            loss: Tensor | None = output.get("loss")
            if loss is None or "logits" not in output:
                raise PruningError(
                    "distill needs outputs with `loss` and `logits`: give labels, and leave label smoothing "
                    "and compute_loss_func out"
                )
            with torch.no_grad():
                expected = teacher(*args, **kwargs)
            soft = soft_loss(output, expected, None, temperature, "logits")
            output["loss"] = (1 - weight) * loss + weight * soft
            return output

        self._remove = model.register_forward_hook(add, with_kwargs=True).remove


def _state_as(model: nn.Module, made: nn.Module) -> None:
    """Give a model the configuration, weights and computed numbers of another of equal sizes, in place.

    The modules stay, with their hooks and with what the user has set in them, such as rates of dropout.
    """
    for name, theirs in made.named_modules():
        ours = model.get_submodule(name)
        if type(theirs).__module__.startswith("torch."):
            continue
        for key, value in vars(theirs).items():
            if type(value) is float or key == "config":
                setattr(ours, key, value)
        for key, buffer in theirs._buffers.items():
            ours._buffers[key] = buffer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(made.get_parameter(name))
