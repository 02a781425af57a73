"""Example inputs for a model of transformers, from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.utils.tree import Inputs

#: Number of tokens in an example; height and width of an image where the configuration states none.
_TOKENS, _PIXELS = 12, 64


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return random inputs for two examples: tokens, images, videos or spectrograms, as the model takes them.

    Raises:
        PruningError: if the model takes other inputs.

    Example:
        ```python
        inputs = example_inputs(model)  # {"input_ids": (2, 12), ...}
        ```
    """
    accepted = inspect.signature(model.forward).parameters
    config: Any = model.config
    made: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    limit = getattr(text, "max_position_embeddings", None) or 0  # XLNet says -1: none
    tokens = min(_TOKENS, limit) if limit > 0 else _TOKENS
    if "input_ids" in accepted:
        made["input_ids"] = torch.randint(0, text.vocab_size, (2, tokens), generator=generator)
    if "pixel_values" in accepted:
        size = getattr(vision, "image_size", None) or _PIXELS
        size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
        channels = getattr(vision, "num_channels", 3)
        made["pixel_values"] = torch.randn(2, *frames, channels, *size, generator=generator)
    if "input_features" in accepted and hasattr(config, "num_mel_bins"):
        length = 2 * getattr(config, "max_source_positions", 100)
        made["input_features"] = torch.randn(2, config.num_mel_bins, length, generator=generator)
    if "input_values" in accepted:
        spectrogram = hasattr(config, "num_mel_bins") and hasattr(config, "max_length")  # not of a waveform
        shape = (config.max_length, config.num_mel_bins) if spectrogram else (4000,)
        made["input_values"] = torch.randn(2, *shape, generator=generator)
    if not made:
        raise PruningError(
            f"{type(model).__name__} takes {', '.join(accepted)}, for which no example can be made; give "
            "example_inputs"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        made["decoder_input_ids"] = torch.randint(0, text.vocab_size, (2, tokens), generator=generator)
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    return {
        key: value.to(device, dtype if value.is_floating_point() else None) for key, value in made.items()
    }


def without_cache(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return inputs that ask for no cache of keys and values, if they are a mapping and the model has one."""
    if isinstance(inputs, Mapping) and "use_cache" in inspect.signature(model.forward).parameters:
        return {**inputs, "use_cache": False}
    return inputs
