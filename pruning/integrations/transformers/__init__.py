"""Models of Hugging Face transformers: constraints, files and training.

`save_pretrained` writes what `from_pretrained` of the unchanged library loads, where a configuration can
describe the widths. `loadable` gives the constraints under which it can.
"""

from pruning.integrations.transformers.constraints import loadable
from pruning.integrations.transformers.files import Saved, load, save_pretrained
from pruning.integrations.transformers.inputs import example_inputs
from pruning.integrations.transformers.trainer import PruningCallback

__all__ = ["PruningCallback", "Saved", "example_inputs", "load", "loadable", "save_pretrained"]
