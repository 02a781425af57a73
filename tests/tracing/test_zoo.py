"""One network of every family of torchvision's classifiers at half of its MACs; docs/zoo.md has them all."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision

from pruning import Budget, load, prune, save
from pruning.planning import count
from pruning.utils.compare import TOLERANCE

#: Height and width of the images for a network.
FAMILIES = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 32,
    "inception_v3": 75, "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32, "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32,
    "swin_v2_t": 224, "vgg11_bn": 32, "vit_b_32": 224,
}  # fmt: skip


def make(name):
    warnings.simplefilter("ignore", FutureWarning)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, num_classes=5, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_every_torchvision_family_is_pruned_and_reloads(name, tmp_path):
    torch.manual_seed(0)
    model, images = make(name).eval(), torch.randn(2, 3, FAMILIES[name], FAMILIES[name])
    step = prune(model, images, Budget(macs="50%"), score="l1", ranking="group")
    assert step.difference <= TOLERANCE
    assert all(width < step.trace.groups[group].channels for group, width in step.plan.widths.items())
    cost = count(step.model, images)
    assert cost.macs <= count(model, images).macs * 0.5 + 1
    step.model(images).square().mean().backward()
    save(tmp_path / "small.pth", step.model)
    again = load(tmp_path / "small.pth", lambda: make(name))
    with torch.no_grad():
        assert torch.equal(again(images), step.model.eval()(images))


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("lraspp_mobilenet_v3_large", torch.zeros(2, 3, 64, 64)),
        ("ssdlite320_mobilenet_v3_large", ([torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)],)),
    ],
)
def test_segmentation_and_detection_networks_are_pruned(name, inputs):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    inputs = torch.utils._pytree.tree_map(torch.rand_like, inputs)
    step = prune(model, inputs, Budget(macs="50%"), score="l1", ranking="group")
    assert step.after.macs <= 0.5 * step.before.macs + 1 and step.difference <= TOLERANCE
    assert len(step.plan.keep) > 25
