"""The networks for 32 x 32 images: their published sizes, their shapes, and that each can be slimmed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import models
from pruning import Budget, load, prune, save, trace
from pruning.cli.build import slim_config
from pruning.cli.main import parse
from pruning.stages.feasibility import reachable
from pruning.surgery import fold_batchnorm

ROOT = Path(__file__).resolve().parents[2]
#: Params in millions with 10 classes. VGG-19, ResNet-164, DenseNet-40: Network Slimming, table 1;
#: ResNet-20 and -56: He et al., arXiv 1512.03385, table 6; MobileNetV2: torchvision's, 10 classes.
#: No size of VGG-16 is published for this head; computed as 9 × Σ inputs × outputs, the norms, the head.
MILLIONS = {
    "vgg16": 14.72,
    "vgg19": 20.04,
    "resnet20": 0.27,
    "resnet56": 0.85,
    "resnet164": 1.70,
    "densenet40": 1.02,
    "mobilenet_v2": 2.237,
}
#: Number of groups: one for each layer with its own group, and one for each residual trunk.
GROUPS = {
    "vgg16": 13,
    "vgg19": 16,
    "resnet20": 3 * 3 + 3,
    "resnet56": 3 * 9 + 3,
    "resnet164": 3 * 18 * 2 + 3 + 1,  # the width of the stem differs from that of the first stage
    "densenet40": 1 + 3 * 12 + 2,
    "mobilenet_v2": 1 + 16 + 7 + 1,  # the stem, wide channels, narrow ones by stage, the last
}
#: Network Slimming, table 1, CIFAR-10: params and FLOPs removed, in percent.
CUTS = {"vgg19": (88.5, 51.0), "resnet164": (35.2, 44.9), "densenet40": (65.2, 55.0)}


def make(name, channels=3, classes=10):
    """Build a network in eval mode with random BatchNorm parameters and statistics, as after training."""
    torch.manual_seed(0)
    net = getattr(models, name)(image_shape=(channels, 32, 32), classes=classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


@pytest.mark.parametrize("name", MILLIONS)
def test_networks_have_the_published_number_of_params(name):
    with torch.device("meta"):
        net = getattr(models, name)()
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=0.02)
    scales = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(scales) > 10 and all(m.bias is None for m in convolutions)


def test_batchnorm_scales_start_at_the_given_value():
    for options, scale in (({}, 0.5), ({"scale": 1.0}, 1.0)):
        for net in (models.resnet20(**options), models.densenet40(**options), models.mobilenet_v2(**options)):
            norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
            assert all((m.weight == scale).all() and not m.bias.any() for m in norms)
            assert net.config["scale"] == scale


@pytest.mark.parametrize("name", MILLIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_have_one_column_per_class(name, channels):
    with torch.device("meta"):
        net, images = (
            getattr(models, name)(image_shape=(channels, 32, 32), classes=7),
            torch.empty(2, channels, 32, 32),
        )
        again = type(net)(**net.config)
    assert net(images).shape == (2, 7)
    assert again.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", MILLIONS)
def test_every_layer_but_the_output_is_in_a_group_with_scales(name):
    net = make(name)
    traced = trace(net, torch.randn(2, 3, 32, 32))
    assert len(traced.groups) == GROUPS[name] and traced.skipped.keys() == {"head.fc"}
    norms = {n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(norms & {member.layer for member in group.side("out")} for group in traced.groups.values())


@pytest.mark.parametrize(
    ("name", "score", "channels"),
    [
        ("vgg16", "l1", 3),
        ("vgg19", "bn_scale", 3),
        ("resnet20", "bn_scale", 1),
        ("resnet20", "l1", 3),
        ("resnet56", "bn_scale", 3),
        ("resnet164", "bn_scale", 3),
        ("densenet40", "bn_scale", 1),
        ("mobilenet_v2", "bn_scale", 3),
        ("mobilenet_v2", "l1", 1),
    ],
)
def test_every_group_is_narrowed_and_the_result_reloads_bit_for_bit(name, score, channels, tmp_path):
    net, images = make(name, channels, classes=7), torch.randn(2, channels, 32, 32)
    step = prune(net, images, Budget(macs="50%"), score=score, ranking="group")
    full = step.trace.widths
    assert all(width < full[group] for group, width in step.plan.widths.items())
    assert step.plan.widths.keys() == full.keys() and step.after.macs <= step.asked.macs
    expected = step.model.eval()(images)
    assert expected.shape == (2, 7)
    save(tmp_path / "net.pth", step.model)
    again = load(tmp_path / "net.pth")
    assert type(again) is type(net) and again.config == net.config
    assert torch.equal(again(images), expected)


@pytest.mark.parametrize("name", ["vgg16", "resnet20", "densenet40", "mobilenet_v2"])
def test_folding_batchnorm_keeps_the_outputs_and_the_result_reloads(name, tmp_path):
    net, images = make(name), torch.randn(2, 3, 32, 32)
    folded = fold_batchnorm(net, trace(net, images))
    torch.testing.assert_close(folded(images), net(images), rtol=1e-4, atol=1e-5)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    # A norm after a sum or a concatenation has no preceding layer into which it could be folded.
    assert left == {"resnet20": 9 + 1, "densenet40": 36 + 2 + 1}.get(name, 0)
    save(tmp_path / "net.pth", folded)
    assert torch.equal(load(tmp_path / "net.pth")(images), folded(images))


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: models.VGG(17), "depth 17: one of 11, 13, 16, 19"),
        (lambda: models.vgg16(image_shape=(3, 8, 32)), "16 x 16"),
        (lambda: models.PreResNet(21), r"depth 21: 6n \+ 2"),
        (lambda: models.PreResNet(20, bottleneck=True, classes=0), "0 classes"),
        (lambda: models.DenseNet(41), r"depth 41: 3n \+ 4"),
        (lambda: models.densenet40(growth=0), "growth 0"),
        (lambda: models.mobilenet_v2(classes=0), "0 classes"),
    ],
)
def test_invalid_arguments_of_networks_raise(make_one, message):
    with pytest.raises(ValueError, match=message):
        make_one()


@pytest.mark.parametrize("name", CUTS)
def test_the_budgets_of_the_recipes_equal_those_of_the_paper_and_can_be_met(name):
    path = ROOT / "recipes" / f"cifar10-{name}.toml"
    args, _ = parse(["slim", "--config", str(path), "--device", "cpu"])
    assert args.model == f"models:{name}"
    budget = slim_config(args).budget
    left = [float(str(limit).rstrip("%")) for limit in (budget.params, budget.macs)]
    assert left == pytest.approx([100 - cut for cut in CUTS[name]])
    reachable(getattr(models, name)(), torch.randn(2, 3, 32, 32), budget)


@pytest.mark.parametrize("shape", [(64, 5, 26, 26), (8, 3, 7, 9), (2, 3, 6, 6), (9, 1, 2, 2)])
def test_pooling_of_large_batches_gives_the_same_outputs_and_gradients(shape):
    from models.pooling import HalvingMaxPool

    images = torch.randn(shape).round(decimals=1)  # with equal values
    quick, plain = HalvingMaxPool().eval(), nn.MaxPool2d(2)
    with torch.no_grad():
        assert torch.equal(quick(images), plain(images))
    gradients = []
    for pool in (quick, plain):
        leaf = images.clone().requires_grad_()
        pool(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
