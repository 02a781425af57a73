"""Save pruned models so that transformers itself loads them, and load them."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from pruning.checkpoint import describe, find_class
from pruning.errors import CheckpointError, PruningError
from pruning.integrations.transformers.adapting import adapted
from pruning.integrations.transformers.depth import dense_config
from pruning.integrations.transformers.fitting import ConfigFit
from pruning.integrations.transformers.inputs import example_inputs as inputs_for
from pruning.integrations.transformers.inputs import without_cache
from pruning.integrations.transformers.sizes import Number, named, numbers_in, quiet
from pruning.load_pruned import rebuild
from pruning.utils.compare import compare, outputs_of
from pruning.utils.files import replace_file
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs
from pruning.utils.wrappers import unwrapped

#: Files of models that no configuration describes, beside the `config.json` of the dense model.
DESCRIPTION, WEIGHTS = "pruned.json", "pruned.safetensors"

FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What `save_pretrained` wrote.

    Attributes:
        folder: with the files.
        changes: the numbers of the configuration that changed, by name.
        reason: why `from_pretrained` cannot load the folder, which then only `load` reads; empty if it can.
        difference: largest relative difference of the outputs after loading.
    """

    folder: File
    changes: Mapping[str, Number] = field(default_factory=dict)
    reason: str = ""
    difference: float = 0.0

    @property
    def loadable(self) -> bool:
        """Whether `from_pretrained` of transformers loads the folder."""
        return not self.reason


def save_pretrained(
    model: nn.Module,
    folder: str | File,
    example_inputs: Inputs | None = None,
    *,
    outputs: Outputs = None,
    strict: bool = False,
) -> Saved:
    """Write a pruned model of transformers to a folder, from which `from_pretrained` loads it.

    The numbers of the configuration are found by proof: the class makes the model of each trial, and all
    sizes are compared, then the outputs. Where no configuration has these sizes, for example because layers
    differ in width, the folder has a format of its own that `load` reads, with a warning that says which
    attribute prevents it. Other files of the folder, such as those of a tokenizer, are left alone.

    Args:
        model: a `PreTrainedModel`, pruned or not; it is not changed.
        folder: is made if missing.
        example_inputs: on which outputs are compared; made from the configuration by default.
        outputs: the outputs to compare (see `trace`); by default all, without a cache.
        strict: raise an error instead of writing the format of its own.

    Raises:
        PruningError: for another kind of model; with `strict`, if no configuration describes the model.

    Example:
        ```python
        step = prune(model, inputs, Budget(macs="50%"), outputs=["logits"], alike=["*.mlp.*"])
        save_pretrained(step.model, "small")
        again = AutoModelForCausalLM.from_pretrained("small")
        ```
    """
    model, folder = unwrapped(model), File(folder)
    if not isinstance(model, transformers.PreTrainedModel):
        raise PruningError(
            f"{type(model).__name__} is no PreTrainedModel of transformers; use pruning.save for it"
        )
    inputs = without_cache(model, inputs_for(model) if example_inputs is None else example_inputs)
    expected = outputs_of(model, inputs, outputs)
    if isinstance(expected, Exception):
        raise PruningError(
            f"{type(model).__name__} does not run on the example inputs: {expected}; give others"
        ) from expected
    configs, reason = ConfigFit(model).configs(model)
    difference = float("inf")
    for config in configs:
        made, difference, reason = adapted(model, config, inputs, outputs)
        if made is not None:
            reason, difference = _write_plain(made, folder, expected, inputs, outputs)
            if not reason:
                return Saved(folder, _changes(model.config, made.config), "", difference)
    if strict:
        raise PruningError(f"{folder} was not written: {_because(reason)}")
    _write_own(model, folder)
    warnings.warn(f"{folder} can be read by `load` alone: {_because(reason)}", stacklevel=2)
    compared = compare(expected, outputs_of(load(folder, device=model.device), inputs, outputs))
    return Saved(folder, {}, reason, compared[1])


def _because(reason: str) -> str:
    return (
        f"no configuration of transformers describes this model; {reason}. Prune with the constraints of "
        "`loadable`, or with alike=[...] for these layers"
    )


def _changes(before: Any, after: Any) -> dict[str, Number]:
    """Return the numbers of a configuration that differ from an earlier one."""
    was = numbers_in(before)
    return {
        named(path): number
        for path, number in numbers_in(after).items()
        if number is not None and was.get(path) != number
    }


def _write_plain(
    made: Any, folder: File, expected: list[Tensor], inputs: Inputs, outputs: Outputs
) -> tuple[str, float]:
    """Write a model as transformers does, if what `from_pretrained` loads has the expected outputs.

    Returns why it has not (empty if it has), and the largest relative difference.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        try:
            with quiet():
                made.save_pretrained(partial)
                again: Any = type(made).from_pretrained(partial, dtype=made.dtype)
        except Exception as error:  # of any kind: the library checks its configuration
            return f"transformers refuses its configuration: {' '.join(str(error).split())}", float("inf")
        reason, difference = compare(expected, outputs_of(again.to(made.device), inputs, outputs))
        if not reason:
            for file in sorted(File(partial).iterdir()):
                file.replace(folder / file.name)
            for name in (DESCRIPTION, WEIGHTS):  # of an earlier time
                (folder / name).unlink(missing_ok=True)
    return reason, difference


def _write_own(model: Any, folder: File) -> None:
    """Write the weights, the configuration of the dense model, and what pruning changed in it."""
    described = describe(model)
    tensors: dict[str, Tensor] = {}
    for part in ("state_dict", "buffers"):
        held: Any = described.pop(part)
        for name, value in held.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{folder} was not written: {name} of the model's state is no tensor; use pruning.save"
                )
            tensors[f"{part}.{name}"] = value.detach().clone().contiguous()  # tied weights share memory
    kind = type(model)
    content = {"format": FORMAT, "class": f"{kind.__module__}:{kind.__qualname__}", **described}
    replace_file(folder / WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
    replace_file(folder / DESCRIPTION, json.dumps(content, indent=1).encode())
    with quiet():
        config = type(model.config).from_dict(dense_config(model).to_dict())
        config.architectures = [kind.__name__]
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)


def load(folder: str | File, *, device: str | torch.device = "cpu") -> Any:
    """Load a model that `save_pretrained` wrote, in eval mode; its class and configuration are found.

    Nothing in the folder is executed.

    Args:
        folder: that `save_pretrained` wrote, or transformers itself. device: of the model.

    Raises:
        CheckpointError: if files are missing or damaged, or do not fit each other.

    Example:
        ```python
        model = load("small")
        ```
    """
    folder = File(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no folder of a model: it has no config.json; give one")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind: the library reads the file
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}; save again") from error
    if (folder / DESCRIPTION).is_file():
        return _read_own(folder, config).to(device).eval()
    names = getattr(config, "architectures", None) or ["?"]
    kind: Any = getattr(transformers, names[0], None)
    if kind is None:
        raise CheckpointError(
            f"{folder}: its class {names[0]} is none of transformers {transformers.__version__}; load it "
            "with from_pretrained of its class"
        )
    try:
        with quiet():
            return kind.from_pretrained(folder, local_files_only=True).to(device).eval()
    except Exception as error:  # of any kind: the library reads the files
        raise CheckpointError(
            f"{folder} cannot be loaded as {names[0]}: {error}; save the model again"
        ) from error


def _read_own(folder: File, config: PretrainedConfig) -> Any:
    """Load a model of the format of our own."""
    path = folder / DESCRIPTION
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise CheckpointError(
                f"{path} has format {content['format']}, this version reads up to {FORMAT}: update the "
                "toolkit"
            )
        stored = safetensors.torch.load_file(folder / WEIGHTS)
    except CheckpointError:
        raise
    except Exception as error:  # of any kind: damaged files
        raise CheckpointError(
            f"{folder} is damaged: {type(error).__name__}: {error}; save the model again"
        ) from error
    for part in ("state_dict", "buffers"):
        content[part] = {
            name.partition(".")[2]: value for name, value in stored.items() if name.startswith(f"{part}.")
        }
    with quiet(), torch.random.fork_rng(devices=[]):
        model: Any = find_class(path, content["class"])(config)
    try:
        rebuild(model, content)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {error}; install the version of transformers that "
            "wrote it"
        ) from error
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model
