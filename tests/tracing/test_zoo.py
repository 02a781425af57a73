"""One network of every family of torchvision's classifiers at half of its MACs; docs/zoo.md has them all."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from torch import nn

from pruning import Budget, load, prune, save
from pruning.planning import count
from pruning.utils.compare import TOLERANCE

#: Height and width of the images for a network.
FAMILIES = {
    "alexnet": 64, "convnext": 32, "densenet": 32, "efficientnet_b0": 32, "googlenet": 32,
    "inception_v3": 75, "maxvit": 32, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32, "resnext": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32,
    "swin_v2": 32, "vgg_bn": 32, "vit": 32,
}  # fmt: skip


def vgg_bn():
    """A VGG with four convolutions and a narrow classifier."""
    features = torchvision.models.vgg.make_layers([16, "M", 32, "M", 64, "M", 512, "M"], batch_norm=True)
    with torch.device("meta"):  # the classifier, which is wide
        model = torchvision.models.VGG(features, num_classes=5)
    for at, (into, out) in {0: (512 * 49, 48), 3: (48, 40), 6: (40, 5)}.items():
        model.classifier[at] = nn.Linear(into, out)
    return model


def alexnet():
    """AlexNet with a narrow classifier."""
    with torch.device("meta"):  # the classifier, which is wide
        model = torchvision.models.AlexNet(num_classes=5)
    model.features.to_empty(device="cpu").apply(
        lambda layer: layer.reset_parameters() if isinstance(layer, nn.Conv2d) else None
    )
    for at, (into, out) in {1: (256 * 36, 48), 4: (48, 40), 6: (40, 5)}.items():
        model.classifier[at] = nn.Linear(into, out)
    return model


#: Networks of torchvision's classes that are smaller than any that it names.
SMALLER = {
    "alexnet": alexnet,
    "convnext": lambda: torchvision.models.ConvNeXt(
        [
            torchvision.models.convnext.CNBlockConfig(16, 32, 1),
            torchvision.models.convnext.CNBlockConfig(32, 64, 2),
            torchvision.models.convnext.CNBlockConfig(64, None, 1),
        ],
        num_classes=5,
    ),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 3, 3, 2), 16, num_classes=5),
    "resnext": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 2, 1], num_classes=5, groups=32, width_per_group=4
    ),
    "maxvit": lambda: torchvision.models.MaxVit(
        (32, 32), stem_channels=16, partition_size=4, block_channels=[16, 32], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.1, num_classes=5,
    ),
    "swin_v2": lambda: torchvision.models.SwinTransformer(
        [4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5,
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    ),
    "vgg_bn": vgg_bn,
    "vit": lambda: torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=240, num_classes=5
    ),
}  # fmt: skip


def make(name):
    warnings.simplefilter("ignore", FutureWarning)
    if name in SMALLER:
        return SMALLER[name]()
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
