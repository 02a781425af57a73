"""A user's module for the command line: networks and data, valid and invalid."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8, classes=3, bias=True):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, bias=bias),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Changed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x)


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 3))


def plain():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 3))


def sized(width):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 3))


def broken():
    raise RuntimeError("no such thing\n  as a net")


class Says(Net):
    def forward(self, x):
        return {"scores": super().forward(x)}


class Pair(Net):
    def forward(self, x):
        return super().forward(x), 1


class Features(Net):
    def forward(self, x):
        maps = self.features(x)
        return {"logits": self.head(maps.mean((2, 3))), "maps": maps}


class Held(Net):
    def __init__(self):
        super().__init__()
        self.width = 8

    def store(self, path):
        path.write_text(str(self.width))


class Divides(Net):
    def forward(self, x):
        maps = self.features[:4](x)
        return self.head(self.features[4:](maps / maps.shape[1]).mean((2, 3)))


def wrapped():
    return nn.DataParallel(Net())


def exported():
    return torch.export.export(Net().eval(), (torch.zeros(2, 1, 10, 10),)).module()


def number():
    return 3


def digits(count=96, batch_size=32):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 10, 10, generator=generator) / 4
    images[:, 0, :5] += labels[:, None, None] - 1.0
    batches = [(images[i : i + batch_size], labels[i : i + batch_size]) for i in range(0, count, batch_size)]
    return batches, batches[:1], batches[-1:]


def regression():
    return [[(images, labels[:, None].float()) for images, labels in split] for split in digits()]


def beyond():
    return [[(images, labels + 5) for images, labels in split] for split in digits()]


def lone():
    return [[(images, labels * 0) for images, labels in split] for split in digits()]


def shares():
    """Return splits by name, with class probabilities as targets."""
    named = zip(("train", "val", "test"), digits(), strict=True)
    return {name: [(x, nn.functional.one_hot(y, 3).float()) for x, y in split] for name, split in named}


class Broken(torch.utils.data.Dataset):
    """A data set with a bug in `__getitem__`."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.zeros(1, 10, 10), {}["label"]


def mistaken(workers=0):
    loader = torch.utils.data.DataLoader(Broken(), 4, num_workers=workers)
    return loader, loader


class Stumbles(Net):
    """A network with a bug in training mode."""

    def forward(self, x):
        return super().forward(x) if not self.training else self.missing(x)


class Ending:
    """Batches that raise an error at the end."""

    def __len__(self):
        return 3

    def __iter__(self):
        yield from digits()[0][:2]
        raise OverflowError("no more")


def ending():
    return Ending(), digits()[1]


def wide():
    return [[(images.repeat(1, 3, 1, 1), labels) for images, labels in split] for split in digits()]


def few():
    return digits()[0], []


def nothing():
    return 5


def unbounded():
    train, _, _ = digits()
    return train, [(images / 0, labels) for images, labels in train[:1]]
