import pytest
import torch
from torch import nn

from pruning import PruningError
from pruning.training import TrainConfig, fit
from pruning.utils.memory_format import channels_last, runs_channels_last


class Viewed(nn.Module):
    """Reshapes the output of a convolution by `view`."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3), nn.Linear(18, 2)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


@pytest.mark.parametrize("dims", [2, 3])
def test_convolutions_train_channels_last_and_keep_their_format(dims):
    torch.manual_seed(0)
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
    net = nn.Sequential(conv(3, 2, 3), nn.Flatten(), nn.Linear(2 * 3**dims, 2))
    before = net[0].weight.clone()
    fit(net, [(torch.randn(4, 3, *[5] * dims), torch.arange(4) % 2)], TrainConfig(1, channels_last=True))
    assert net[0].weight.is_contiguous() and not torch.equal(net[0].weight, before)


def test_weights_that_are_channels_last_stay_so():
    format = torch.channels_last
    net = nn.Conv2d(3, 4, 3).to(memory_format=format)
    with channels_last(net):
        assert net.weight.is_contiguous(memory_format=format)
    assert net.weight.is_contiguous(memory_format=format)


def test_code_that_views_the_output_of_a_convolution_does_not_run_channels_last():
    images = torch.randn(4, 3, 5, 5)
    assert runs_channels_last(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(18, 2)), images)
    net = Viewed()
    assert not runs_channels_last(net, images)
    with pytest.raises(PruningError, match="use reshape there"):
        fit(net, [(images, torch.arange(4) % 2)], TrainConfig(1, channels_last=True))
    net(images)
