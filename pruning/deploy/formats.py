"""Formats of exported files, and the runtimes that open them."""

#: The file name extension of each format.
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".torchscript"}

#: The runtime of each format; pt2 and TorchScript run in torch itself.
RUNTIMES = {"onnx": "onnxruntime", "pt2": "pt2", "torchscript": "torchscript"}
