"""Settings of the training loop."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pruning.errors import PruningError
from pruning.utils.settings import Setting, require_valid

#: The toolkit's own optimizers, each with a peak learning rate for stage 3 that suits most networks.
OPTIMIZERS = {"sgd": 0.2, "soap": 0.05}

#: Peak learning rate of a training that is given none.
DEFAULT_RATE = 0.1

SCHEDULES = ("one-cycle", "cosine", "step", "constant")

#: Share of the steps in which a one-cycle rate rises, and the share of the peak at which warm-ups begin.
RISE, START = 0.2, 1 / 25

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Each field states its meaning and bounds.

    The one-cycle schedule is that of Smith & Topin (arXiv 1708.07120). Measure whether `channels_last`
    is faster: a small network took 0.8 times as long on one CPU thread, but twice as long on two. Without a
    rate, `fit` takes `DEFAULT_RATE` with `sgd` and `soap`, and with other optimizers their own default;
    `slim` takes one that fits the stage and the network (see `SlimConfig`).

    In Python, `optimizer` may also be a function of the parameter groups, such as
    `functools.partial(torch.optim.AdamW, betas=(0.9, 0.98))`. If it accepts `lr`, it is given the rate;
    otherwise the rates of its groups are scaled, so that the first group has it. Each group has a
    `weight_decay`: that of the settings for weights, 0 for norms and biases.

    Raises:
        PruningError: a setting is out of its bounds, or an optimizer does not exist.

    >>> TrainConfig(8, lr=0.2).momentum
    0.9
    >>> TrainConfig(8, optimizer="AdamW", optimizer_args={"betas": (0.9, 0.98)}, schedule="cosine").peak
    0.001
    """

    epochs: Annotated[int, Setting("training epochs; 0 trains nothing", metavar="N", least=0, stages="each")]
    lr: Annotated[
        float | None, Setting("peak learning rate", name="rate", metavar="RATE", above=0, stages="each")
    ] = None
    optimizer: Annotated[
        str | Callable[..., Any],
        Setting(
            "sgd (with Nesterov momentum), an optimizer of torch.optim such as adamw, or in the last stage "
            "soap, which needs fewer epochs but only for networks of at most a few thousand parameters; "
            "those of torch.optim have peak rates of their own by default",
            metavar="NAME",
            last_only=("soap",),
            group="training",
        ),
    ] = "sgd"
    optimizer_args: Annotated[
        list[str] | Mapping[str, Any],
        Setting(
            "arguments of the optimizer, such as betas=0.9,0.98",
            name="optimizer-arg",
            metavar="KEY=VALUE",
            follows="optimizer",
            group="training",
            later="setting",
        ),
    ] = field(default_factory=list)
    momentum: Annotated[float, Setting("momentum of sgd and soap", least=0, below=1, flag=False)] = 0.9
    weight_decay: Annotated[
        float,
        Setting(
            "L2 factor on weights; not applied to norms and biases",
            metavar="FACTOR",
            least=0,
            group="training",
        ),
    ] = 0.0
    schedule: Annotated[
        str,
        Setting(
            "learning rate: one-cycle (rises to its peak, falls to almost 0), cosine (falls to almost 0), "
            "step (falls at --milestones) or constant",
            choices=SCHEDULES,
            group="training",
            later="flag",
        ),
    ] = "one-cycle"
    warmup: Annotated[
        float | None,
        Setting(
            "share of the steps in which the rate rises to its peak (default: 0.2 with one-cycle, else 0)",
            metavar="SHARE",
            least=0,
            below=1,
            group="training",
            later="flag",
        ),
    ] = None
    milestones: Annotated[
        tuple[float, ...],
        Setting(
            "shares of the steps after which the rate of the schedule step falls",
            metavar="SHARE",
            above=0,
            below=1,
            group="training",
            later="setting",
        ),
    ] = (0.5, 0.75)
    step_factor: Annotated[
        float,
        Setting(
            "factor by which it falls",
            metavar="FACTOR",
            above=0,
            below=1,
            group="training",
            later="setting",
        ),
    ] = 0.1
    clip_norm: Annotated[
        float | None,
        Setting(
            "largest L2 norm of the gradients of a step, to which larger ones are scaled (default: no limit)",
            metavar="NORM",
            above=0,
            group="training",
            later="setting",
        ),
    ] = None
    accumulate: Annotated[
        int,
        Setting(
            "batches whose gradients are averaged for one step of the optimizer",
            metavar="N",
            least=1,
            group="training",
            later="setting",
        ),
    ] = 1
    label_smoothing: Annotated[
        float,
        Setting(
            "share of every target that is spread over all classes, in the cross entropy",
            metavar="SHARE",
            least=0,
            below=1,
            group="training",
            later="setting",
        ),
    ] = 0.0
    mixup: Annotated[
        float,
        Setting(
            "mix pairs of training images, by torchvision's MixUp of this alpha; 0 does not",
            metavar="ALPHA",
            least=0,
            group="training",
            later="setting",
        ),
    ] = 0.0
    cutmix: Annotated[
        float,
        Setting(
            "paste parts of training images into others, by torchvision's CutMix of this alpha; 0 does not. "
            "With --mixup, every batch has one of the two",
            metavar="ALPHA",
            least=0,
            group="training",
            later="setting",
        ),
    ] = 0.0
    ema: Annotated[
        float,
        Setting(
            "decay per step of an exponential moving average of the weights, which is then validated and "
            "kept in their place; 0 disables it",
            metavar="DECAY",
            least=0,
            most=0.99999,
            stages="last",
        ),
    ] = 0.0
    eval_mode: Annotated[
        bool,
        Setting(
            "train in evaluation mode: BatchNorm keeps its statistics, and dropout leaves nothing out. For "
            "few examples, whose batches have statistics of their own",
            stages="last",
            group="training",
            later="setting",
        ),
    ] = False
    channels_last: Annotated[
        bool,
        Setting(
            "train in torch's channels_last memory format: may be faster on one CPU thread",
            group="training",
        ),
    ] = False

    precision: Annotated[
        str,
        Setting(
            "forward passes of training in float32, bfloat16 or float16 (torch.autocast); weights and "
            "validation stay in float32; fp16 scales the loss, and needs a GPU",
            choices=PRECISIONS,
            group="training",
            later="setting",
        ),
    ] = "fp32"
    compile: Annotated[
        bool,
        Setting("train the network compiled by torch.compile", group="training", later="setting"),
    ] = False

    def __post_init__(self) -> None:
        require_valid(self)
        object.__setattr__(self, "optimizer_args", self.arguments)
        object.__setattr__(self, "milestones", shares(self.milestones))
        if isinstance(self.optimizer, str):
            object.__setattr__(self, "optimizer", self.optimizer.lower())
        if self.optimizer not in OPTIMIZERS or self.optimizer_args:
            from pruning.training.torch_optimizers import require_optimizer  # needs torch

            require_optimizer(self.optimizer, self.arguments)
        if self.schedule == "one-cycle" and self.warmup == 0:
            raise PruningError(
                "TrainConfig.warmup 0: expected a share above 0 with the schedule one-cycle; without a rise, "
                "it is the schedule cosine"
            )

    @property
    def peak(self) -> float:
        """Return the peak learning rate; where none is given, the optimizer's default (`DEFAULT_RATE`)."""
        if self.lr is not None:
            return self.lr
        return DEFAULT_RATE if (own := self.own_rate) is None else own

    @property
    def own_rate(self) -> float | None:
        """Return the default learning rate of an optimizer that is none of the toolkit's own."""
        if self.optimizer in OPTIMIZERS:
            return None
        from pruning.training.torch_optimizers import default_rate  # needs torch

        return default_rate(self.optimizer, self.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the optimizer by name."""
        return keyword_arguments(self.optimizer_args)

    @property
    def mixes(self) -> bool:
        """Return whether training images are mixed, so that no batch is as the source gives it."""
        return bool(self.mixup or self.cutmix)

    @property
    def rise(self) -> float:
        """Return the share of the steps in which the rate rises."""
        if self.warmup is None:
            return RISE if self.schedule == "one-cycle" else 0.0
        return self.warmup

    def steps(self, batches: int) -> int:
        """Return the number of optimizer steps of an epoch of so many batches.

        >>> TrainConfig(1, accumulate=4).steps(10)
        3
        """
        return -(-batches // self.accumulate)

    def rate(self, progress: float) -> float:
        """Return the learning rate as a share of `peak`, given the share of all steps done, 0 to 1.

        The one-cycle rate rises from 1/25 to 1 and then falls to almost 0, each by half a cosine. Other
        schedules rise linearly from 1/25 to 1, if there is a warm-up; then cosine falls by half a cosine.

        >>> [round(TrainConfig(1, schedule="cosine", warmup=0.5).rate(x), 2) for x in (0, 0.25, 0.5, 0.75)]
        [0.04, 0.52, 1.0, 0.5]
        >>> [TrainConfig(1, schedule="step").rate(x) for x in (0, 0.5)]
        [1.0, 0.1]
        """
        rise = self.rise
        if progress < rise and self.schedule == "one-cycle":
            return 1 - (1 - 1 / 25) * (1 + math.cos(math.pi * progress / rise)) / 2
        if progress < rise:
            return START + (1 - START) * progress / rise
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return float(self.step_factor ** sum(progress >= share for share in self.milestones))
        return (1 + math.cos(math.pi * (progress - rise) / (1 - rise))) / 2


def keyword_arguments(given: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments given as texts KEY=VALUE, or as a mapping, as a dictionary.

    A value that is no Python literal is text.

    >>> keyword_arguments(["betas=0.9,0.98", "amsgrad=True"])
    {'betas': (0.9, 0.98), 'amsgrad': True}
    """
    if isinstance(given, Mapping):
        return dict(given)
    found = dict[str, object]()
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise PruningError(f"optimizer argument {text!r}: expected KEY=VALUE, such as betas=0.9,0.98")
        try:
            found[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[key] = value
    return found


def shares(given: Iterable[float]) -> tuple[float, ...]:
    """Return milestones as an ascending tuple.

    Raises:
        PruningError: if one is not above 0 and below 1.
    """
    found = tuple(given)
    for share in found:
        if not 0 < share < 1:
            raise PruningError(
                f"TrainConfig.milestones {share!r}: expected shares of the steps, above 0 and below 1"
            )
    return tuple(sorted(found))
