"""Exported files of several inputs, of keyword inputs, without a batch, and of other dynamic dimensions."""

from __future__ import annotations

import pytest
import torch
from commands import need_onnx
from torch import nn

from pruning import export
from pruning.deploy import Exported
from pruning.deploy.formats import RUNTIMES, SUFFIXES
from pruning.deploy.runtimes import relative_difference
from pruning.errors import ExportError


@pytest.fixture(params=list(SUFFIXES))
def format(request):
    if request.param == "onnx":
        need_onnx()
    return request.param


class Masked(nn.Module):
    """Takes tokens, an option, and by keyword alone their weights."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids, pooled=True, *, mask):
        y = self.layer(self.embedding(ids)) * mask.unsqueeze(-1)
        return {"y": y.sum(1), "all": y} if pooled else y


class Graph(nn.Module):
    """One graph: features of nodes, and edges; there is no batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, edges):
        y = self.layer(x)
        return torch.zeros_like(y).index_add(0, edges[1], y[edges[0]])


class Shaped(nn.Module):
    """Has code for one size of its input."""

    def forward(self, x):
        return x + 1 if x.shape[2] == 8 else x.tanh()


EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 3, 1]])


def reopened(model, path, inputs, format, **options):
    """Export a model, and return what the file runs, by name; ONNX inputs have the names of arguments."""
    export(model, path, inputs, format, **options)
    return Exported(path, RUNTIMES[format])


@pytest.mark.parametrize("pooled", [True, False])
def test_keyword_inputs_are_exported_by_name(pooled, format, tmp_path):
    torch.manual_seed(0)
    net = Masked().eval()
    inputs = {"mask": torch.ones(2, 7), "ids": torch.arange(14).reshape(2, 7) % 9, "pooled": pooled}
    file = reopened(net, tmp_path / "net", inputs, format, dynamic={"ids": 1, "mask": [-1]})
    more = {"mask": torch.rand(5, 4), "ids": torch.arange(20).reshape(5, 4) % 9}
    expected = net(**more, pooled=pooled)
    assert relative_difference(expected, file(**more)) <= 1e-5
    if format == "onnx":
        assert relative_difference(expected, file(more["ids"], mask=more["mask"])) <= 1e-5
        assert file._run.inputs == ["ids", "mask"]


def test_without_a_batch_nothing_is_dynamic_unless_asked(tmp_path):
    need_onnx()
    net, x = Graph().eval(), torch.randn(5, 4)
    written = export(net, tmp_path / "fixed", (x, EDGES), "onnx")
    assert not written.batched and "no batch was found" in str(written)
    fixed = Exported(tmp_path / "fixed", "onnxruntime")
    assert [i.shape for i in fixed._run.session.get_inputs()] == [[5, 4], [2, 7]]
    assert fixed.metadata["input_shape"] == [[5, 4], [2, 7]]
    free = reopened(net, tmp_path / "free", (x, EDGES), "onnx", dynamic={"x": 0, "edges": 1})
    more, edges = torch.randn(8, 4), torch.tensor([[7, 6, 0], [1, 7, 7]])
    assert relative_difference(net(more, edges), free(more, edges)) <= 1e-5


def test_the_batch_of_a_recurrent_layer_is_its_second_dimension(format, tmp_path):
    torch.manual_seed(0)
    net = nn.LSTM(4, 3).eval()
    file = reopened(net, tmp_path / "net", torch.randn(6, 2, 4), format)
    more = torch.randn(6, 5, 4)
    assert relative_difference(net(more)[0], file(more)[0]) <= 1e-5
    assert file.metadata["input_shape"] == [6, 4]


def test_images_of_another_size_run_where_both_sides_are_dynamic(format, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()).eval()
    file = reopened(net, tmp_path / "net", torch.randn(2, 3, 8, 8), format, dynamic={"input": (2, 3)})
    more = torch.randn(4, 3, 9, 21)
    assert relative_difference(net(more), file(more)) <= 1e-5


def test_a_dimension_that_the_code_fixes_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"x:2 cannot be dynamic, its code fixes it to 8") as error:
        export(Shaped(), tmp_path / "net", torch.randn(2, 3, 8, 6), "pt2", dynamic={"x": 2})
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
    file = reopened(Shaped(), tmp_path / "net", torch.randn(2, 3, 8, 6), "pt2", dynamic={"x": 3})
    assert file(torch.randn(2, 3, 8, 11)).shape == (2, 3, 8, 11)


@pytest.mark.parametrize(
    ("dynamic", "reason"),
    [
        ({"y": 1}, "there is no such input; there are: input"),
        ({"input": 4}, "expected a dimension from 0 to 3"),
        ({"input": 1}, "at least size 2"),
    ],
)
def test_impossible_dynamic_dimensions_are_refused(dynamic, reason, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export(nn.Identity(), tmp_path / "net", torch.ones(2, 1, 3, 3), "pt2", dynamic=dynamic)
    assert list(tmp_path.iterdir()) == []


def test_what_torchscript_cannot_take_is_said_with_the_cure(tmp_path):
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    with pytest.raises(ExportError, match=r"outputs .* of tensors.*--to onnx"):
        export(Net(3, 2), tmp_path / "net", torch.ones(2, 3), "torchscript")
    export(Net(3, 2), tmp_path / "net", torch.ones(2, 3), "pt2")


def test_a_torchscript_module_is_refused_by_name(tmp_path):
    with pytest.warns(match="deprecated"):
        scripted = torch.jit.trace(nn.Linear(3, 3), torch.ones(2, 3))
    net = nn.Sequential(nn.Linear(3, 3), scripted)
    with pytest.raises(ExportError, match="module '1' of Sequential is TorchScript"):
        export(net, tmp_path / "net", torch.ones(2, 3), "pt2")


def test_an_argument_that_forward_does_not_take_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"Graph.forward has no argument 'z'; it takes: x, edges"):
        export(Graph(), tmp_path / "net", {"x": torch.ones(5, 4), "z": EDGES}, "pt2")
