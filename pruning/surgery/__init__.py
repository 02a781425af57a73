"""Make a model smaller: apply a plan, verify it, fold BatchNorm, remove whole layers.

`apply`, `refit` and `verify` are in the files of these names.
"""

from pruning.surgery.apply import channel_constants
from pruning.surgery.batchnorm import equalize, fold_batchnorm, recalibrate
from pruning.surgery.block_removal import block_influence
from pruning.surgery.expert_removal import expert_usage, mixtures, without_experts
from pruning.surgery.layer_removal import Removable, removable, without_layer
from pruning.surgery.optimizer_state import transfer
from pruning.surgery.plain_weights import with_plain_weights
from pruning.surgery.verify import with_random_weights

__all__ = [
    "Removable",
    "block_influence",
    "channel_constants",
    "equalize",
    "expert_usage",
    "fold_batchnorm",
    "mixtures",
    "recalibrate",
    "removable",
    "transfer",
    "with_plain_weights",
    "with_random_weights",
    "without_experts",
    "without_layer",
]
