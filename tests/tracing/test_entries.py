"""Other ways to call a model, traced together with the example inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, doctor, prune, trace

pytestmark = pytest.mark.quick


class Decoder(nn.Module):
    """Another entry point makes the latent variables that the forward pass computes."""

    def __init__(self):
        super().__init__()
        self.latent, self.encoder, self.decoder = 12, nn.Linear(20, 12), nn.Linear(12, 24)
        self.out = nn.Linear(24, 20)

    def forward(self, x):
        return self.decode(torch.relu(self.encoder(x)))

    def decode(self, z):
        return self.out(torch.relu(self.decoder(z)))

    def sample(self, n, scale=1.0):
        return self.decode(scale * torch.randn(n, self.latent))


@pytest.mark.parametrize("sample", [lambda m: m.sample(2), lambda m: m.sample(3, scale=0.5)])
def test_attributes_that_another_entry_point_reads_follow(sample):
    torch.manual_seed(0)
    net, x = Decoder().eval(), torch.randn(4, 20)
    step = prune(net, x, Budget(macs="50%"), score="l2", also=[sample], widths={"encoder": 5})
    assert step.model.latent == 5 and step.difference < 1e-4
    assert sample(step.model).shape == sample(net).shape
    assert net.latent == 12, "the given model is not changed"


def test_other_inputs_reach_the_layers_of_another_branch():
    class Domains(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])

        def forward(self, x, domain=0):
            return self.out(torch.relu(self.norms[domain](self.conv(x))))

    net, x = Domains().eval(), torch.randn(2, 3, 6, 6)
    step = prune(net, x, Budget(macs="50%"), score="l2", also=[(x, 1), {"x": x, "domain": 0}])
    assert [norm.num_features for norm in step.model.norms] == [step.plan.widths["conv"]] * 2
    keep = list(step.plan.keep["conv"])
    masked = torch.zeros(16)
    masked[keep] = 1
    for domain in (0, 1):
        features = torch.relu(net.norms[domain](net.conv(x))) * masked[:, None, None]
        assert torch.allclose(step.model(x, domain), net.out(features), atol=1e-5)
    assert "conv" not in trace(net, x, also=[(x, 1)]).foldable, "two norms read it"


def test_a_reparameterization_is_checked_on_the_pruned_model():
    class Two(nn.Module):
        """The sum of two branches, or one convolution with the sum of their weights."""

        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Conv2d(width, 16, 3, padding=1), nn.Conv2d(width, 16, 1)

        def forward(self, x):
            return self.whole(x) if hasattr(self, "whole") else self.a(x) + self.b(x)

        def merge(self):
            whole = nn.Conv2d(self.a.in_channels, self.a.out_channels, 3, padding=1)
            whole.weight.data = self.a.weight.data + nn.functional.pad(self.b.weight.data, [1] * 4)
            whole.bias.data = self.a.bias.data + self.b.bias.data
            self.whole = whole

    class Fixed(Two):
        def merge(self):
            super().merge()
            self.whole.weight.data = self.whole.weight.data.view(16, -1, 3, 3)

    def merged(model):
        for module in list(model.modules()):
            if isinstance(module, Two):
                module.merge()
        return model(x)

    x = torch.randn(2, 3, 6, 6)
    net = nn.Sequential(Two(3), nn.ReLU(), Two(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    step = prune(net, x, Budget(macs="50%"), score="l2", also=[merged], widths={"0.a": 7, "2.a": 5})
    before = step.model(x)
    assert torch.allclose(merged(step.model), before, atol=1e-5)
    fixed = nn.Sequential(Fixed(3), nn.ReLU(), Two(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    assert trace(fixed, x).widths.keys() == {"0.a", "2.a"}
    found = trace(fixed, x, also=[merged])
    assert found.widths.keys() == {"2.a"} and "tied to its width" in found.skipped["0.a"]


def test_outputs_of_another_entry_point_keep_their_size_unless_they_are_not_returned():
    net, x = Decoder(), torch.randn(4, 20)
    kept = doctor(net, x, also=[lambda m: m.encoder(x)])
    assert [group.name for group in kept.groups] == ["decoder"]
    assert "an output of also[0]" in kept.skipped["encoder"]
    found = doctor(net, x, also=[lambda m: m.encoder(x).sum() * 0, lambda m: None])
    assert [group.name for group in found.groups] == ["encoder", "decoder"] and not found.trial


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (lambda m: m, r"also is a function: expected a list"),
        (["sample"], r"also\[0\] is a str: expected a function"),
        ([nn.Linear(2, 2)], r"also\[0\] is a Linear"),
        ([lambda m: None, lambda m: m.samples(2)], r"also\[1\] fails: AttributeError"),
        ([torch.zeros(2, 7)], r"also\[0\] fails: RuntimeError"),
    ],
)
def test_wrong_entries_are_refused(also, message):
    with pytest.raises(PruningError, match=message):
        trace(Decoder(), torch.randn(4, 20), also=also)
