"""The stages trace networks of the same layers and sizes once."""

from __future__ import annotations

import nets
import pytest
import torch
from nets import ShuffledBatches, batches
from torch import nn

from pruning import Budget, SlimConfig, prune, slim, trace
from pruning.stages import PruneConfig
from pruning.stages.prune import KEPT_TRACES, StepSettings
from pruning.training import TrainConfig, accuracy

pytestmark = pytest.mark.quick


def members(traced):
    """Return the places of all channels of all groups."""
    return {
        name: [(m.layer, m.side, m.index.tolist(), m.channel.tolist()) for m in group.members]
        for name, group in traced.groups.items()
    }


@pytest.mark.parametrize("name", ["residual", "grouped", "attention", "shuffled", "inverted"])
def test_a_trace_does_not_depend_on_the_values_of_weights(name):
    net, images, settings = nets.make(name), nets.images(), StepSettings()
    known = settings.traced(net, images)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    assert settings.traced(net, images) is known
    again = trace(net, images)
    assert members(again) == members(known) and again.skipped == known.skipped
    assert again.foldable == known.foldable and again.uses == known.uses
    assert repr(again.sizes) == repr(known.sizes)


def test_another_form_of_the_network_is_traced_anew():
    net, images, settings = nets.make("residual"), nets.images(), StepSettings()
    known = settings.traced(net, images)
    assert settings.traced(net, images.clone()) is not known
    small = prune(net, images, Budget(macs="60%"), score="l2").model
    assert settings.traced(small, images).widths != known.widths
    next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d)).weight.requires_grad_(False)
    assert settings.traced(net, images).skipped != known.skipped


def test_the_latest_traces_are_kept():
    images, settings = torch.randn(2, 3), StepSettings()
    wide = [nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)) for width in range(4, 6 + KEPT_TRACES)]
    first, *others = [settings.traced(net, images) for net in wide]
    assert len(settings.traces) == KEPT_TRACES
    assert settings.traced(wide[-1], images) is others[-1] and settings.traced(wide[0], images) is not first


def test_slimming_traces_the_network_once_before_and_once_after_each_step(monkeypatch):
    traced = []

    def count(model, *arguments, **options):
        traced.append([layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)])
        return trace(model, *arguments, **options)

    monkeypatch.setattr("pruning.stages.prune.trace", count)
    monkeypatch.setattr("pruning.stages.sparsify.trace", count)
    one, data = TrainConfig(1, lr=0.05), batches()
    config = SlimConfig(Budget(params="30%"), one, PruneConfig(2, one), one)
    result = slim(nets.make("lenet"), ShuffledBatches(), data[0][0], config, calibration=data,
                  validate=lambda m: accuracy(m, data), log=lambda _: None)  # fmt: skip
    assert len(traced) == 3 and traced[0] > traced[1] > traced[2]
    widths = [layer.out_channels for layer in result.model.modules() if isinstance(layer, nn.Conv2d)]
    assert traced[2] == widths
