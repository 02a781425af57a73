"""Knowledge distillation: a loss that compares a model's outputs and features with those of a teacher."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.training.batches import BatchSource, first_batch, length, pair, to_device
from pruning.training.losses import Loss, cross_entropy, loss_of, with_label_smoothing
from pruning.training.output_comparison import (
    Comparison,
    comparable,
    feature_names,
    relative_error,
    soft_loss,
)
from pruning.utils import distributed
from pruning.utils.modules import call, device_of, eval_mode, hooked
from pruning.utils.tree import Inputs, fresh, tensors
from pruning.utils.wrappers import unwrapped

#: Modules whose outputs are compared: names, texts STUDENT=TEACHER, or a mapping.
Features = Mapping[str, str] | Sequence[str]


class Distillation:
    """A loss that also compares a model with a teacher (Hinton et al., arXiv 1503.02531); see `distillation`.

    Attributes:
        projections: of features whose widths differ, by position; made by `begin_training`.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        weight: float,
        temperature: float,
        loss: Loss,
        features: Features,
        compare: Comparison,
    ):
        self.teacher = None if teacher is None else teacher.eval()
        self.weight, self.temperature, self.loss, self.compare = weight, temperature, loss, compare
        self.features = feature_names(features if isinstance(features, Mapping) else list(features))
        self.hard = loss_of(loss)
        self.projections = nn.ModuleDict()
        if teacher is not None:
            require_features(None, teacher, self.features)

    def __call__(self, model: nn.Module, inputs: Inputs, targets: object) -> Tensor:
        """Return the loss of a batch; without a teacher, the targets are (targets, teacher's outputs)."""
        wanted: dict[str, Tensor] = {}
        if self.teacher is None:
            targets, reference = pair(targets)
        else:
            with torch.no_grad(), recorded(self.teacher, self.features.values()) as wanted:
                reference = call(self.teacher, inputs)
        outputs: list[object] = []
        hard: Tensor | None = None
        # The model runs once: `hard` calls it, and a hook stores its outputs.
        handle = model.register_forward_hook(lambda _, __, output: outputs.append(output))
        with hooked([handle]), recorded(model, self.features) as found:
            if self.weight < 1:
                hard = self.hard(model, inputs, targets)
            else:
                call(model, inputs)
        soft = soft_loss(outputs[-1], reference, targets, self.temperature, self.compare)
        if self.features:
            soft = soft + self._feature_loss(found, wanted)
        return soft if hard is None else (1 - self.weight) * hard + self.weight * soft

    def with_label_smoothing(self, share: float) -> Distillation:
        """Return the same loss with smoothed labels in its own part."""
        loss = with_label_smoothing(self.loss, share)
        return Distillation(self.teacher, self.weight, self.temperature, loss, self.features, self.compare)

    def begin_training(self, model: nn.Module, batches: Iterable[object]) -> nn.Module | None:
        """Make the projections of features whose widths differ; return them, if there are any.

        The random generators do not change.

        Raises:
            PruningError: if a feature is no module or no tensor, or if it cannot be projected.
        """
        if not self.features or self.teacher is None:
            return None
        require_features(model, self.teacher, self.features)
        device = device_of(model)
        devices = [device] if device.type == "cuda" else []
        self.projections = nn.ModuleDict()
        with torch.random.fork_rng(devices=devices), eval_mode(model):
            inputs, _ = to_device(first_batch(batches), device)
            with torch.no_grad():
                with recorded(model, self.features) as found:
                    call(model, fresh(inputs))
                with recorded(self.teacher, self.features.values()) as wanted:
                    call(self.teacher, fresh(inputs))
            for number, (mine, theirs) in enumerate(self.features.items()):
                dim = _projected_dimension(mine, found[mine], theirs, wanted[theirs])
                if dim is not None:
                    sizes = found[mine].shape[dim], wanted[theirs].shape[dim]
                    self.projections[str(number)] = nn.Linear(*sizes, bias=False, device=device)
        if len(self.projections) and distributed.size() > 1:
            raise PruningError(
                "features of other widths than the teacher's are projected in one process only: train "
                "without torchrun, or leave them out of the features"
            )
        return self.projections if len(self.projections) else None

    def _feature_loss(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        """Return the mean of the relative errors of the features, projected where that is needed."""
        terms = []
        for number, (mine, theirs) in enumerate(self.features.items()):
            values, reference = found[mine], wanted[theirs]
            dim = _projected_dimension(mine, values, theirs, reference)
            if dim is not None:
                if str(number) not in self.projections:
                    raise PruningError(
                        f"feature {mine!r} has another width than the teacher's, and its projection is "
                        "trained with the model: train by `fit` or `finetune`"
                    )
                values = self.projections[str(number)](values.movedim(dim, -1)).movedim(-1, dim)
            terms.append(relative_error(values, reference))
        return torch.stack(terms).mean()


def distillation(
    teacher: nn.Module | None,
    weight: float,
    temperature: float = 4.0,
    loss: Loss = cross_entropy,
    *,
    features: Features = (),
    compare: Comparison = "auto",
) -> Distillation:
    """Return a loss that also compares the outputs with a teacher's (Hinton et al., arXiv 1503.02531).

    It is (1 − weight) loss + weight D, with D = T² KL(softmax(teacher / T) ‖ softmax(student / T)) for
    logits. For other values, such as embeddings, D is their mean squared difference divided by the mean
    square of the teacher's. Of an object or a mapping with `logits`, as models of transformers return it,
    these are compared; of any other container, all floating-point tensors, and D is the mean.

    Args:
        teacher: network with the same outputs; it is put into eval mode and not trained. With None the
            targets must be pairs (targets, teacher's outputs); see `with_teacher`.
        weight: weight of the teacher in the loss, 0 to 1. With 1 the targets may be None.
        temperature: T, above 0.
        loss: loss of the student's outputs and the targets, see `fit`.
        features: names of modules whose outputs are compared, too (Romero et al., arXiv 1412.6550), as
            `"layer3"`, or `"layer3=blocks.7"` where the teacher's has another name. The mean of their
            relative squared differences is added to D. Where a width differs, a linear projection of the
            student's features is trained with the model.
        compare: `"logits"` or `"values"` says what outputs are; `"auto"` takes a tensor for logits, with the
            classes along dimension 1, if the targets are classes of its shape.

    Returns:
        A function of (model, inputs, targets). It raises `PruningError` if the outputs of teacher and
        student cannot be compared.

    >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> loss = distillation(teacher, weight=0.5)
    >>> loss(student, torch.rand(8, 4), torch.arange(8) % 3).shape
    torch.Size([])
    """
    return Distillation(teacher, weight, temperature, loss, features, compare)


def with_teacher(
    teacher: nn.Module,
    batches: BatchSource,
    weight: float,
    temperature: float,
    loss: Loss = cross_entropy,
    *,
    features: Features = (),
    compare: Comparison = "auto",
    changing: bool = False,
) -> tuple[BatchSource, Loss]:
    """Return batches and a loss for distillation; the teacher's outputs are computed only once if possible.

    If every epoch yields the same inputs, this function runs the teacher on them and stores its outputs
    with the targets. That is so for a list of batches, and for a source with a method
    `with_outputs(function)`. The method applies the function to the inputs of every batch, and returns
    the batches with targets (targets, outputs), or None if the inputs change between epochs, as
    augmented images do. If the outputs take more memory than the inputs, they are not stored, and the
    teacher runs on every batch of every epoch; so it does where features are compared.

    Args:
        batches: the training batches.
        teacher, weight, temperature, loss, features, compare: see `distillation`.
        changing: the training changes the inputs (MixUp).
    """

    def outputs_of(inputs: Inputs) -> object:
        with torch.no_grad(), eval_mode(teacher):
            outputs = call(teacher, to_device((inputs, None), device_of(teacher))[0])
        return outputs if isinstance(outputs, Tensor) else comparable(outputs)

    def counted_outputs(inputs: Inputs) -> object:
        bar.update()
        return outputs_of(inputs)

    is_list, with_outputs = type(batches) in (list, tuple), getattr(batches, "with_outputs", None)
    stored: BatchSource | None = None
    if (is_list or with_outputs is not None) and not features and not changing:
        with torch.random.fork_rng(devices=[]):  # reading a batch here must not change training's draws
            inputs = first_batch(batches)[0]
        outputs = outputs_of(inputs)
        fits = _bytes(outputs) <= _bytes(inputs) and (is_list or isinstance(outputs, Tensor))
        if fits:
            with tqdm(
                total=length(batches),
                desc="teacher",
                unit="batch",
                disable=distributed.rank() > 0 or None,
                leave=False,
            ) as bar:
                if with_outputs is not None:
                    stored = with_outputs(counted_outputs)
                else:
                    stored = [(x, (y, counted_outputs(x))) for x, y in map(pair, batches)]
    if stored is None:
        return batches, distillation(teacher, weight, temperature, loss, features=features, compare=compare)
    return stored, distillation(None, weight, temperature, loss, compare=compare)


def require_features(
    model: nn.Module | None, teacher: nn.Module | None, features: Mapping[str, str] | Sequence[str]
) -> None:
    """Check that the modules whose outputs are compared exist.

    Raises:
        PruningError: if one does not; the message names the nearest.
    """
    pairs = feature_names(features if isinstance(features, Mapping) else list(features))
    for network, names, whose in ((model, pairs.keys(), "model"), (teacher, pairs.values(), "teacher")):
        if network is None:
            continue
        known = [name for name, _ in unwrapped(network).named_modules() if name]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise PruningError(
                    f"feature {name!r}: the {whose} has no such module"
                    f"{f'; did you mean {near[0]!r}?' if near else ''}"
                )


@contextlib.contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the first tensor that each of some modules returns within the block, by name."""
    found: dict[str, Tensor] = {}
    names = list(names)
    if names and hasattr(model, "_orig_mod"):
        raise PruningError("features of a compiled network cannot be compared: train with compile=False")

    def record(name: str, output: object) -> None:
        values = tensors(output)
        if not values:
            raise PruningError(
                f"feature {name!r} returns a {type(output).__name__} without a tensor; name another module"
            )
        found[name] = values[0]

    inner = unwrapped(model) if names else model
    handles = [
        inner.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: record(name, output))
        for name in names
    ]
    with hooked(handles):
        yield found


def _projected_dimension(mine: str, values: Tensor, theirs: str, reference: Tensor) -> int | None:
    """Return the dimension in which features of two networks differ; None if they have the same shape."""
    if values.ndim == reference.ndim:
        sizes = enumerate(zip(values.shape, reference.shape, strict=True))
        differing = [dim for dim, (a, b) in sizes if a != b]
        if not differing or (len(differing) == 1 and differing[0] > 0):
            return differing[0] if differing else None
    raise PruningError(
        f"feature {mine!r} has shape {tuple(values.shape)}, the teacher's {theirs!r} "
        f"{tuple(reference.shape)}: expected features that differ in one dimension, the width, at most"
    )


def _bytes(values: object) -> int:
    """Return the total memory of the tensors in nested values, in bytes."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
