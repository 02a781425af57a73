"""Write one HTML file in which networks classify drawings; they run in the page, without a server.

Each network is exported and lowered to a list of operations (`pruning.demo.program`), which a few
hundred lines of JavaScript in the page run. The page compares its outputs with PyTorch's on stored
images and shows the difference.
"""

from pruning.demo.writer import Demo, Images, demo

__all__ = ["Demo", "Images", "demo"]
