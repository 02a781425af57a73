"""A runtime of the user's: its files are checked in it, and it is gone once it is removed."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from pruning import LatencyBudget, PruningError, export, prune
from pruning.deploy import Exported, register_runtime
from pruning.errors import ExportError

pytestmark = pytest.mark.quick


def write(model, program, batch, signature, facts):
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def opened(factor):
    """Return an opener whose networks return their outputs times a factor."""

    def opener(content, threads):
        run = torch.export.load(io.BytesIO(content)).module()
        return lambda x: factor * run(x), {"threads": str(threads)}

    return opener


class Cancelling(nn.Module):
    """Adds a large number and subtracts it again, which rounds the values in between."""

    def forward(self, x):
        return (x + 1000) - 1000


@pytest.mark.numerics
@pytest.mark.parametrize(("error", "is_written"), [(0, True), (1e-3, False)])
def test_rounding_of_the_model_is_no_error_of_the_file(error, is_written, tmp_path):
    def opener(content, threads):
        return lambda x: x * (1 + error), {}  # more exact than the model, but for the error

    images = torch.rand(3, 4)
    assert float((Cancelling()(images) - images).abs().max()) > 1e-5
    with register_runtime("mine", write, opener):
        if is_written:
            assert export(Cancelling(), tmp_path / "net", images, "mine").difference <= 1e-5
        else:
            with pytest.raises(ExportError, match=r"differ from the model's by .*\(tolerance 1e-05\)"):
                export(Cancelling(), tmp_path / "net", images, "mine")
            assert not (tmp_path / "net").exists()


def test_a_file_is_written_checked_and_run_in_the_runtime(tmp_path):
    net, images = nn.Linear(4, 2), torch.randn(3, 4)
    with register_runtime("mine", write, opened(1)):
        made = export(net, tmp_path / "net", images, "mine")
        exported = Exported(made.path, "mine", threads=2)
        torch.testing.assert_close(exported(images), net(images))
        assert exported.metadata == {"threads": 2} and "reopened in mine" in str(made)
    with pytest.raises(ExportError, match="format 'mine' is unknown; there are: onnx, pt2, torchscript"):
        export(net, tmp_path / "other", images, "mine")
    with pytest.raises(ExportError, match="runtime 'mine' is unknown"):
        Exported(made.path, "mine")
    with pytest.raises(PruningError, match="runtime 'mine' is unknown; choose one of: eager, onnxruntime"):
        LatencyBudget("0.5x", "mine")


def test_a_runtime_with_other_outputs_leaves_no_file(tmp_path):
    handle = register_runtime("doubled", write, opened(2))
    try:
        with pytest.raises(ExportError, match="outputs differ from the model's"):
            export(nn.Linear(4, 2), tmp_path / "net", torch.randn(3, 4), "doubled")
    finally:
        handle.remove()
        handle.remove()
    assert list(tmp_path.iterdir()) == []


def test_networks_are_timed_in_the_runtime_under_a_latency_budget():
    net, open_file, seen = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), opened(1), []

    def opener(content, threads):
        seen.append(threads)
        return open_file(content, threads)

    with register_runtime("mine", write, opener, suffix=".net"):
        budget = LatencyBudget("100000x", "mine", threads=1, seconds=0.05)
        step = prune(net, torch.randn(64, 8), budget, score="l2", multiple=32)
    assert step.latency is not None and step.latency.networks == 2 and step.after == step.before
    assert len(seen) > 2 and set(seen) == {1}, "each file is opened to check it and to time it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pt2", write, write), "there is a runtime or a format 'pt2' already; give another name"),
        (("onnxruntime", write, write), "'onnxruntime' already"),
        (("eager", write, write), "'eager' already"),
        (("a b", write, write), "'a b' is not a name of a runtime; give an identifier"),
        (("mine", "text", write), r"the writer of mine is a str; give a function \(model, program"),
        (("mine", write, None), r"the opener of mine is a NoneType; give a function \(content, threads\)"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments, message):
    with pytest.raises(ExportError, match=message):
        register_runtime(*arguments)
