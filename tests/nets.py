"""Small networks, each with a structure that surgery must handle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

from models import LeNet5, YourNet
from pruning.demo import Images


class Block(nn.Module):
    """The residual branch of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(8, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


class Residual(nn.Module):
    """Two residual blocks: sums tie the channels of the trunk across layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenation, then BatchNorm over channels of two groups (DenseNet's order)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)
        self.norm, self.last = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.cat([x, self.second(x)], 1)
        x = torch.relu(self.last(torch.relu(self.norm(x))))
        return self.head(x.amax((2, 3)))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, projection (MobileNetV2's block)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        )
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convolution and GroupNorm: every part must lose the same number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 3, bias=False),
            nn.GroupNorm(2, 12),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3, groups=4),
            nn.PReLU(8),
            nn.Conv2d(8, 6, 1),
            nn.GroupNorm(6, 6),
            nn.PReLU(),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class UpAndDown(nn.Module):
    """Transposed convolutions, plain and grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tokens(nn.Module):
    """Linear layers and LayerNorm over tokens, (N, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3 * 14, 10), nn.LayerNorm(10)
        self.up, self.down, self.head = nn.Linear(10, 16), nn.Linear(16, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x.permute(0, 2, 1, 3).flatten(2)))
        return self.head(torch.relu(self.down(nn.functional.gelu(self.up(x)))).mean(1))


class Shuffled(nn.Module):
    """Channel split, a branch, concatenation and channel shuffle (ShuffleNetV2's unit)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 6, 1, bias=False),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
                nn.BatchNorm2d(6),
                nn.Conv2d(6, 4, 1),
            )
            for _ in range(2)
        )
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            kept, changed = x.chunk(2, dim=1)
            x = torch.cat([kept, branch(changed)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x).mean((2, 3))


class Lines(nn.Module):
    """A recurrent layer and a cell that read the columns of an image in order, as in text recognition."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        )  # fmt: skip
        self.read = nn.GRU(4 * 7, 5, num_layers=2, bidirectional=True)
        self.mix, self.cell, self.head = nn.Linear(10, 6), nn.LSTMCell(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        read, _ = self.read(self.columns(x).flatten(1, 2).permute(2, 0, 1))
        state = None
        for column in torch.relu(self.mix(read)):
            state = self.cell(column, state)
        assert state is not None
        return self.head(state[0])


class ChannelsNorm(nn.LayerNorm):
    """LayerNorm over the channels of images (ConvNeXt's)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """Parameters and buffers outside the layers of the table: a frozen norm, a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), ChannelsNorm(6)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("scale", torch.rand(6) + 0.5)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.layer_scale = nn.Parameter(torch.randn(6, 1, 1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.stem(x) - self.mean.reshape(1, -1, 1, 1)) * self.scale.reshape(1, -1, 1, 1)
        inner = self.down(nn.functional.gelu(self.up(self.norm(x).permute(0, 2, 3, 1))))
        x = x + self.layer_scale * inner.permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Patches(nn.Module):
    """A class token and a position embedding before residual blocks over tokens (ViT's order)."""

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 1, stride=7)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 40), nn.Linear(40, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if attention else None
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        if self.attention is not None:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x[:, 0])


@dataclass
class Answer:
    """Outputs in an object unknown to torch's pytree."""

    logits: object
    features: object


def plain(bias: bool = True) -> nn.Module:
    """Convolutions with biases and no BatchNorm, flattened into a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3, bias=bias),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(64, 9),
        nn.Tanh(),
        nn.Linear(9, 4),
    )


def multiplied() -> nn.Module:
    """A depthwise convolution with two outputs per channel, as in EEGNet, followed by another one."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 8, 3, groups=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ELU(),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 6, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 8 * 8, 4),
    )


class WithNorm(nn.Conv2d):
    """A convolution that contains its norm and calls F.conv2d itself, as in detectron2."""

    def __init__(self, inputs: int, outputs: int, norm: nn.Module, **options: Any) -> None:
        super().__init__(inputs, outputs, 3, padding=1, **options)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        how = {"weight": self.weight, "bias": self.bias, "padding": self.padding, "groups": self.groups}
        return torch.relu(self.norm(nn.functional.conv2d(x, **how)))


class Dilated(WithNorm):
    """A convolution that applies one weight with two dilations."""

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.conv2d(x, self.weight, padding=2, dilation=2)
        return torch.relu(self.norm(wide + self._conv_forward(x, self.weight, None)))


def holders() -> nn.Module:
    """Convolutions that contain their norms."""
    return nn.Sequential(
        WithNorm(3, 8, nn.BatchNorm2d(8), bias=False),
        WithNorm(8, 8, nn.BatchNorm2d(8), groups=8),
        Dilated(8, 6, nn.GroupNorm(3, 6), bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Bending(DeformConv2d):
    """A deformable convolution that computes its offsets from its input."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.offset = nn.Conv2d(sizes[0], 18, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return deform_conv2d(x, self.offset(x), self.weight, self.bias, padding=self.padding)


class Still(DeformConv2d):
    """A deformable convolution with zero offsets, which its code creates."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x.new_zeros(len(x), 18, *x.shape[2:]))


class Deformable(nn.Module):
    """Deformable convolutions whose offsets come from other layers: two offset groups, and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.places = nn.Conv2d(8, 54, 3, padding=1)
        self.bent = DeformConv2d(8, 12, 3, padding=1)
        self.where = nn.Conv2d(12, 18, 1)
        self.each = DeformConv2d(12, 12, 3, stride=2, padding=2, dilation=2, groups=12, bias=False)
        self.last, self.own = nn.BatchNorm2d(12), Bending(12, 6, 3, padding=1)
        self.still, self.head = Still(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        *offset, mask = self.places(x).chunk(3, 1)
        x = torch.relu(self.bent(x, torch.cat(offset, 1), mask.sigmoid()))
        x = torch.relu(self.last(self.each(x, self.where(x)[..., ::2, ::2])))
        return self.head(self.still(self.own(x).relu()).relu().mean((2, 3)))


def lenet(**options: object) -> nn.Module:
    return LeNet5((4, 6), (9, 7), image_shape=(3, 14, 14), batch_norm=True, classes=4, **options)  # type: ignore[arg-type]


def yournet() -> nn.Module:
    return YourNet((5,), (8,), image_shape=(3, 14, 14), batch_norm=True, classes=4)


class Words(nn.Module):
    """A classifier of sentences; with `tied`, a next-word predictor with tied input and output weights."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.wide, self.slim = nn.Embedding(10, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 10 if tied else 2)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, sentences: Tensor) -> Tensor:
        return self.head(self.slim(torch.relu(self.wide(self.words(sentences).mean(1)))))


def words() -> Tensor:
    """Return two sentences, (2, 10), each of which contains every word."""
    return torch.stack([torch.arange(10), torch.arange(9, -1, -1)])


#: Every network takes (N, 3, 14, 14) images.
NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "lenet": lenet,
    "yournet": yournet,
    "residual": Residual,
    "dense": Dense,
    "inverted": Inverted,
    "grouped": Grouped,
    "multiplied": multiplied,
    "holders": holders,
    "up_and_down": UpAndDown,
    "tokens": Tokens,
    "shuffled": Shuffled,
    "scaled": Scaled,
    "patches": Patches,
    "attention": lambda: Patches(attention=True),
    "lines": Lines,
    "deformable": Deformable,
}
#: The description of these images for a demo page.
SMALL = Images((3, 14, 14), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def make(name: str, seed: int = 0) -> nn.Module:
    """Build a network in eval mode with random weights, norms and statistics."""
    torch.manual_seed(seed)
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 14, 14)


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the current state dict."""
    return {key: value.clone() for key, value in net.state_dict().items()}


def batches(count=4, size=16, seed=3):
    """Return batches of images whose class is the brightest of four regions."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, 3, 14, 14, generator=draw)
    labels = torch.randint(0, 4, (count, size), generator=draw)
    for batch, classes in zip(images, labels, strict=True):
        for image, label in zip(batch, classes, strict=True):
            image[:, 3 * int(label) : 3 * int(label) + 3] += 1.5
    return list(zip(images, labels, strict=True))


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class ShuffledBatches:
    """Batches in a new order for each epoch, drawn from the global generator as by a DataLoader."""

    def __init__(self):
        self.batches = batches()

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return (self.batches[i] for i in torch.randperm(len(self.batches)).tolist())
