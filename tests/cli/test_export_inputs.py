"""`export` on the command line: models of several inputs, and dynamic dimensions."""

from __future__ import annotations

import pytest
import torch
from commands import need_onnx

from pruning.deploy import Exported

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids, mask):
        return (self.layer(self.embedding(ids)) * mask.unsqueeze(-1)).sum(1)

class Shaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x):
        return self.layer(x.reshape(x.shape[0], 3, 8, 6))
"""

SEVERAL = ("--input", "ids:2x7:int64", "mask:2x7")


@pytest.fixture
def exported(run, tmp_path):
    """Run `export` on a network of the module `several`."""
    (tmp_path / "several.py").write_text(MODULE)

    def export(*words, net="Net", to="pt2"):
        import several

        torch.manual_seed(0)
        torch.save(getattr(several, net)().state_dict(), tmp_path / "net.pth")
        return run("export", "net.pth", "--model", f"several:{net}", "--to", to, *words)

    return export


def test_several_inputs_are_given_by_name(exported, tmp_path):
    need_onnx()
    code, out, err = exported(*SEVERAL, "--dynamic", "ids:1", "--dynamic", "mask:1", to="onnx")
    assert code == 0, err
    assert "dynamic: ids:1, mask:1" in out
    file = Exported(tmp_path / "net.onnx", "onnxruntime")
    assert file._run.inputs == ["ids", "mask"] and file.metadata["input_shape"] == [[7], [7]]
    assert file(ids=torch.ones(5, 3, dtype=torch.int64), mask=torch.ones(5, 3)).shape == (5, 3)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--input", "ids"), "expected a name, sizes with the batch"),
        (("--input", "ids:2x7:whole"), "expected a name, sizes with the batch"),
        (("--input", "ids:2x7:int64", "ids:2x7:int64"), "is given twice"),
        (("--input", "tokens:2x7:int64"), "no such argument; it takes: ids, mask"),
        (("--input", "ids:2x7", "mask:2x7"), "types other than float32"),
        ((*SEVERAL, "--input-shape", "7"), "give one of them"),
        ((*SEVERAL, "--dynamic", "ids"), "such as x:2"),
        ((*SEVERAL, "--dynamic", "ids:2"), "expected a dimension from 0 to 1"),
        ((*SEVERAL, "--dynamic", "x:1"), "there are: ids, mask"),
        (("--input-shape", "7"), "several inputs: --input ids:"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(words, reason, exported, tmp_path):
    code, _, err = exported(*words)
    assert code == 2 and reason in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "net.pt2").exists()


def test_a_dimension_that_the_code_fixes_is_refused_in_one_line(exported, tmp_path):
    code, _, err = exported("--input-shape", "3x8x6", "--dynamic", "x:2", net="Shaped")
    assert code == 2 and "x:2: Shaped runs at no other size" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "net.pt2").exists()
