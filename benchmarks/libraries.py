"""Prune unmodified networks of other libraries to half of their MACs: docs/libraries.md.

    python -m pip install timm ultralytics segmentation-models-pytorch monai einops pytorchcv
    python -m benchmarks.libraries
    python -m benchmarks.libraries --libraries timm --print

`libraries.toml` lists the networks; those of libraries that are not installed are skipped. Every
network has random weights and is pruned by one `prune` step to 50 % of its MACs, the same share of
every group, with the check of equivalence. A backward pass must then reach every parameter that it
reached before, and the checkpoint must give bit-identical outputs in a fresh network. Each network
runs in its own process. Each result is saved at once, and existing results are not computed again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.process import result_or_error
from benchmarks.results import read_json, table, write_json
from eval.cli import ROOT
from pruning import Budget, PruningError, cli, load, prune, save
from pruning.cli.factories import arguments_of, make_model
from pruning.utils.files import replace_file
from pruning.utils.tree import tensors

LIST = ROOT / "benchmarks" / "libraries.toml"
RESULTS = ROOT / "benchmarks" / "libraries.json"
TABLE = ROOT / "docs" / "libraries.md"
#: Timeout for a network, in seconds.
PATIENCE = 300


def main() -> None:
    networks = dict(listed())
    known = sorted({library for library, _ in networks})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--libraries", nargs="+", choices=known, default=known, metavar="NAME", help="libraries to test"
    )
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="networks to test (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results, as JSON")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table, as Markdown")
    parser.add_argument("--threads", type=cli.whole_number(1), default=2, help="CPU threads")
    parser.add_argument("--print", action="store_true", help="only print existing results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        print("\n" + json.dumps(tried(networks[args.one[0], args.one[1]])))
        return
    results = read_json(args.results, {})
    for library, name in () if args.print else networks:
        version = installed(library)
        if library not in args.libraries or name not in (args.networks or [name]) or not version:
            continue
        of_library = results.setdefault(library, {"version": version, "networks": {}})
        if name not in of_library["networks"]:
            flags = ["--one", library, name, "--threads", str(args.threads)]
            of_library["networks"][name] = found = result_or_error("libraries", flags, PATIENCE)
            write_json(args.results, results, sort_keys=True)
            replace_file(args.table, markdown(results).encode())
            print(library, name, found.get("error", f"{found.get('macs', 1):.1%} of the MACs"), flush=True)
    if args.print:
        print(markdown(results))


def listed() -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Yield the networks of the list by library and name; each with factory, arguments and shape."""
    for library, entries in cli.tomllib.loads(LIST.read_text(encoding="utf-8")).items():
        for entry in entries:
            options = arguments_of(entry.get("options", []))
            for name in entry.get("names", [entry["factory"].partition(":")[2]]):
                own = {entry["argument"]: name} if "argument" in entry else {}
                shape = [int(size) for size in entry["shape"].split("x")]
                made = {"factory": entry["factory"], "arguments": {**options, **own}, "shape": shape}
                yield (library, name), made


def installed(library: str) -> str:
    """Return the version of a library, or an empty string if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def tried(made: dict[str, Any]) -> dict[str, Any]:
    """Prune, train for a step, save and load a network; raises `PruningError` where one of them fails."""
    warnings.simplefilter("ignore")

    def fresh() -> nn.Module:
        return make_model(made["factory"], made["arguments"])

    def reached(net: nn.Module) -> set[str]:
        losses = [x.square().mean() for x in tensors(net(inputs)) if x.requires_grad]
        torch.stack(losses).sum().backward()
        return {name for name, p in net.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    model, inputs = fresh().eval(), torch.randn(2, *made["shape"])
    step = prune(model, inputs, Budget(macs="50%"), score="l1", ranking="group")
    lost = reached(model) - reached(step.model)
    if lost:
        raise PruningError(f"no gradient reaches {', '.join(sorted(lost))}")
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "small.pth", step.model, arguments={})
        again = load(Path(folder) / "small.pth", fresh)
    with torch.no_grad():
        pairs = zip(tensors(again(inputs)), tensors(step.model.eval()(inputs)), strict=True)
        if not all(torch.equal(*pair) for pair in pairs):
            raise PruningError("the reloaded network gives other outputs")
    return {
        "groups": len(step.trace.groups),
        "skipped": len(step.trace.skipped),
        "sizes": [size.name for size in step.trace.sizes],
        "params": step.after.params / step.before.params,
        "macs": step.after.macs / step.before.macs,
        "difference": step.difference,
    }


def markdown(results: dict[str, Any]) -> str:
    """Format the tables, each after its summary."""
    lines = [
        "# Networks of other libraries",
        "",
        "As they come, with random weights, one step to 50 % of their MACs, made by `python -m "
        "benchmarks.libraries`, which says what is done. Params and MACs are what is left; sizes are "
        "attributes by which a network's code views or splits channels, and which follow them.",
        "",
    ]
    for library, found in sorted(results.items()):
        networks = found["networks"]
        pruned = [name for name, result in networks.items() if "error" not in result]
        lines += [f"## {library} {found['version']}", "", f"{len(pruned)} of {len(networks)} pruned.", ""]
        rows = [line(name, result) for name, result in sorted(networks.items())]
        lines += table(["network", "groups", "layers kept whole", "sizes", "params", "MACs"], rows)
    return "\n".join(lines)


def line(name: str, result: dict[str, Any]) -> list[str]:
    if "error" in result:
        return [name, f"refused: {result['error'][:160].replace('|', '/')}", "", "", "", ""]
    numbers = [str(result["groups"]), str(result["skipped"]), str(len(result["sizes"]) or "")]
    return [name, *numbers, f"{result['params']:.0%}", f"{result['macs']:.1%}"]


if __name__ == "__main__":
    cli.run(main)
