"""The networks: the assignment's reference and what slimming makes of it."""

from models.LeNet5 import LeNet5
from models.YourNet import YourNet

__all__ = ["LeNet5", "YourNet"]
