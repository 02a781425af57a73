"""Make the model of a configuration compute the same as a pruned one, whose sizes it has.

The class computes some numbers from the configuration, which pruning leaves as they were: the scale of
attention (`head_dim ** -0.5`) and the frequencies of rotary embeddings. The ratio of the scales is multiplied
into the weights of q. Frequencies are stated as `longrope`, which has a factor for each of them. Outputs are
compared with the weights of the model and with random ones, on which attention depends.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from pruning.integrations.transformers.sizes import quiet
from pruning.surgery.verify import with_random_weights
from pruning.utils.compare import compare, outputs_of
from pruning.utils.modules import copied
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs

#: Most places of the ratios of scales that are tried.
_MOST_TRIALS = 64


@dataclass(frozen=True)
class Fold:
    """A factor that is multiplied into outputs of a layer.

    Attributes:
        layer: name of the layer. rows: the outputs, (rows,). factor: of the scales.
    """

    layer: str
    rows: Tensor
    factor: float


def adapted(
    model: nn.Module, config: PretrainedConfig, inputs: Inputs, outputs: Outputs
) -> tuple[nn.Module | None, float, str]:
    """Return the model of a configuration with the weights of a pruned model and the same outputs.

    Args:
        model: the pruned model. config: of its sizes.
        inputs, outputs: example inputs, and the outputs that are compared.

    Returns the model, or None if its outputs differ; the largest relative difference; and why they differ.
    """
    model = copied(model).eval()
    config = _with_frequencies(model, config)
    try:
        with quiet():
            getattr(config, "validate", lambda: None)()
            made = with_weights_of(model, config)
    except Exception as error:  # of any kind: the class checks its configuration
        return None, float("inf"), f"transformers refuses its configuration: {' '.join(str(error).split())}"
    if unsaved := _unsaved(model, config):
        return (
            None,
            float("inf"),
            (f"transformers stores no {unsaved}, and computes other values of it from the configuration"),
        )
    expected, probe = outputs_of(model, inputs, outputs), with_random_weights(model, inputs)
    expected_of_probe = outputs_of(probe, inputs, outputs)
    scales = _differing_scales(model, made)
    reason, difference = "", float("inf")
    for folds in itertools.islice(_choices(made, scales), _MOST_TRIALS):
        reason, difference = compare(
            expected_of_probe, outputs_of(_folded(with_weights_of(probe, config), folds), inputs, outputs)
        )
        if reason:
            continue
        candidate = _folded(made, folds)
        reason, difference = compare(expected, outputs_of(candidate, inputs, outputs))
        if not reason:
            return candidate, difference, ""
    return None, difference, _explained(reason, model, made, scales)


def _explained(reason: str, model: nn.Module, made: nn.Module, scales: Iterable[str]) -> str:
    """Add to the difference of outputs what the class computes otherwise."""
    causes = [*scales, *(name for name in _frequencies(model) if _buffer_differs(model, made, name))]
    return f"{reason}; the configuration gives other values of {', '.join(causes)}" if causes else reason


def _unsaved(model: nn.Module, config: PretrainedConfig) -> str:
    """Return the name of a tensor that files of a class lack, and that it computes otherwise; or nothing."""
    state = model.state_dict()
    names = [name for name in getattr(model, "_keys_to_ignore_on_save", None) or () if name in state]
    if not names:
        return ""
    with quiet(), torch.random.fork_rng(devices=[]):
        made = type(model)(copy.deepcopy(config)).state_dict()
    return next((name for name in sorted(names) if not _equal(state[name], made[name])), "")


def with_weights_of(model: nn.Module, config: PretrainedConfig) -> nn.Module:
    """Return a new model of a class and a configuration, with the weights of a model of equal sizes."""
    with quiet(), torch.random.fork_rng(devices=[]):
        made: Any = type(model)(copy.deepcopy(config))
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    device = next(model.parameters()).device
    return made.to(device).eval()


# ---- Rotary embeddings


def _frequencies(model: nn.Module) -> list[str]:
    """Return the names of the buffers that hold frequencies of rotary embeddings."""
    return [name for name, _ in model.named_buffers() if name.rpartition(".")[2] == "inv_freq"]


def _buffer_differs(model: nn.Module, made: nn.Module, name: str) -> bool:
    return not _equal(model.get_buffer(name), made.get_buffer(name))


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours.cpu(), theirs.cpu(), rtol=1e-6)


def _with_frequencies(model: nn.Module, config: PretrainedConfig) -> PretrainedConfig:
    """State the frequencies of rotary embeddings that pruning has left, if the configuration gives others."""
    names = _frequencies(model)
    with quiet(), torch.random.fork_rng(devices=[]):
        made = type(model)(copy.deepcopy(config))
    stated: Any = getattr(config, "rope_parameters", None)
    if not isinstance(stated, dict) or not any(_buffer_differs(model, made, name) for name in names):
        return config
    ours = model.get_buffer(names[0])
    if any(not torch.equal(model.get_buffer(name), ours) for name in names) or "rope_theta" not in stated:
        return config  # each kind of layer has its own
    scaling = getattr(model.get_submodule(names[0].rpartition(".")[0]), "attention_scaling", 1.0)
    parameters = {
        **stated,
        "rope_type": "longrope",
        "attention_factor": float(scaling),
        "factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    for key in ("long_factor", "short_factor"):
        parameters[key] = [1.0] * len(ours)
    changed = copy.deepcopy(config)
    changed.rope_parameters = copy.deepcopy(parameters)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            plain = type(model)(copy.deepcopy(changed)).get_buffer(names[0])
    except Exception:  # of any kind: the class takes no such frequencies
        return config
    if plain.shape != ours.shape:
        return config
    factors = (plain.double().cpu() / ours.double().cpu()).tolist()
    changed.rope_parameters = {**parameters, "long_factor": factors, "short_factor": factors}
    return changed


# ---- Scales


def _differing_scales(model: nn.Module, made: nn.Module) -> dict[str, float]:
    """Return by `module.attribute` the ratio of the numbers that the two models hold, where they differ."""
    ratios: dict[str, float] = {}
    for name, module in made.named_modules():
        ours = vars(model.get_submodule(name))
        for attribute, theirs in vars(module).items():
            own = ours.get(attribute)
            if type(theirs) is not float or type(own) is not float or own * theirs <= 0:
                continue
            if abs(own / theirs - 1) > 1e-9:
                ratios[f"{name}.{attribute}".lstrip(".")] = own / theirs
    return ratios


def _choices(made: nn.Module, scales: Mapping[str, float]) -> Iterator[list[Fold]]:
    """Yield ways to make up for scales: the same layer and part of it in all modules of a type."""
    yield []
    by_type: dict[type[nn.Module], dict[str, float]] = {}
    for full, ratio in scales.items():
        name = full.rpartition(".")[0]
        by_type.setdefault(type(made.get_submodule(name)), {})[name] = ratio
    options = []
    for modules in by_type.values():
        first = made.get_submodule(next(iter(modules)))
        places = [(child, part) for child in _layers(first) for part in range(len(_rows(first, child)))]
        options.append([(modules, child, part) for child, part in places])
    if not options:
        return
    for chosen in itertools.product(*options):
        folds = []
        for modules, child, part in chosen:
            for name, ratio in modules.items():
                rows = _rows(made.get_submodule(name), child)
                if part < len(rows):
                    folds.append(Fold(f"{name}.{child}".lstrip("."), rows[part], ratio))
        yield folds


def _layers(module: nn.Module) -> list[str]:
    """Return the names of the layers inside a module that have a weight, those of q first."""
    names = [
        n for n, layer in module.named_modules() if n and isinstance(getattr(layer, "weight", None), Tensor)
    ]
    return sorted(names, key=lambda name: ("norm" not in name, not name.startswith("q")))


def _outputs_dim(layer: nn.Module) -> int:
    return 1 if isinstance(layer, Conv1D) else 0


def _rows(module: nn.Module, child: str) -> list[Tensor]:
    """Return the outputs of a layer that may be q: all, the first, or one third of each head."""
    layer: Any = module.get_submodule(child)
    width = layer.weight.shape[_outputs_dim(layer)]
    every = torch.arange(width)
    found = [every]
    for name in _layers(module):
        other: Any = module.get_submodule(name)
        if name != child and other.weight.ndim > 1 and not isinstance(other, nn.Embedding):
            read = other.weight.shape[1 - _outputs_dim(other)]  # the projection of all heads reads as many
            if read < width:
                found.append(every[:read])
    for head in {n for n in vars(module).values() if type(n) is int and n > 0 and width % (3 * n) == 0}:
        found.append(every[every // head % 3 == 0])
    return found


def _folded(made: nn.Module, folds: Iterable[Fold]) -> nn.Module:
    """Return a copy of a model with factors multiplied into its layers."""
    made = copied(made)
    with torch.no_grad():
        for fold in folds:
            layer: Any = made.get_submodule(fold.layer)
            rows = fold.rows.to(layer.weight.device)
            dim = _outputs_dim(layer)
            layer.weight.index_copy_(dim, rows, layer.weight.index_select(dim, rows) * fold.factor)
            if getattr(layer, "bias", None) is not None:
                layer.bias.index_copy_(0, rows, layer.bias.index_select(0, rows) * fold.factor)
    return made
