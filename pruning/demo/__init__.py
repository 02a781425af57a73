"""One HTML file in which a network says what is drawn: it runs in the page, without a server.

The exported network becomes a list of operations (`pruning.demo.program`), which a few hundred lines
of JavaScript in the page run. The page checks itself: it computes what PyTorch computed on
images that both know, and says how far apart they are.
"""

from pruning.demo.writer import Demo, Images, demo

__all__ = ["Demo", "Images", "demo"]
