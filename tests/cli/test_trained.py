"""`python -m pruning slim --weights`: a trained network is the reference of lines, files and the report."""

from __future__ import annotations

import json
import re

import pytest
import torch
from user import NET

from pruning.checkpoint import read

SHORT = ("--sparsify-epochs", 2, "--recover-epochs", 1, "--finetune-epochs", 2, "--iterations", 2)


@pytest.fixture
def dense(run, tmp_path):
    import mine

    from pruning.training import TrainConfig, fit

    torch.manual_seed(0)
    model = fit(mine.Net(), mine.digits()[0], TrainConfig(20, lr=0.05))
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    return model


def test_the_given_network_is_the_reference_of_lines_files_and_report(run, dense, tmp_path):
    code, out, err = run("slim", *NET, "--weights", "trained.pth", *SHORT, "--max-macs", "50%",
                         "--output", "first")  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    given = re.match(r"given network: validation (\d\.\d{4}) on 64 examples \(standard error", lines[1])
    assert given, lines
    assert float(given[1]) > 0.9 and "range tests find peak rates of" in lines[1]
    assert f", given {given[1]}; made by stage " in lines[-1]
    load = lambda name: torch.load(tmp_path / "first" / name, weights_only=True)["state_dict"]  # noqa: E731
    assert all(torch.equal(value, load("given.pth")[key]) for key, value in dense.state_dict().items())
    zeros = [(load(name)["features.1.weight"] == 0).sum() + (load(name)["features.5.weight"] == 0).sum()
             for name in ("given.pth", "sparsified.pth")]  # fmt: skip
    assert zeros[0] == 0 < zeros[1]
    facts = read(tmp_path / "first" / "best.pth")["provenance"]
    assert facts["given_accuracy"] == pytest.approx(float(given[1]), abs=1e-4)
    assert not (tmp_path / "first" / "dense.pth").exists()

    assert run("report", "first")[0] == 0
    page = (tmp_path / "first" / "report.html").read_text()
    for text in ("validation of the given network", "validation after stage 1", "validation of the result"):
        assert text in page
    compared = json.loads((tmp_path / "first" / "mistakes.json").read_text())
    right = sum(row[i] for i, row in enumerate(compared["confusion"]["dense"]))
    assert right / 64 == pytest.approx(float(given[1]), abs=1e-4), "it is compared with the given network"

    code, again, err = run("slim", "--resume", "--output", "first")
    assert code == 0, err
    assert again.splitlines()[-1] == lines[-1]


def test_a_rate_of_ones_own_holds_for_every_stage(run, dense, tmp_path):
    words = ("slim", *NET, "--weights", "trained.pth", *SHORT, "--max-macs", "50%", "--rate", 0.01)
    code, out, err = run(*words, "--output", "first")
    assert code == 0 and "range tests" not in out, err
    history = (tmp_path / "first" / "history.jsonl").read_text().splitlines()
    rates = {}
    for event in map(json.loads, history):
        if "lr" in event:
            rates.setdefault(event["stage"][:7], []).append(event["lr"])
    assert 0.005 < max(rates["stage 1"]) <= 0.01 and max(rates["stage 2"]) <= 0.005
    assert run(*words[:-1], 0)[0] == 2


def test_weights_at_chance_are_trained_like_a_fresh_network(run, tmp_path):
    import mine

    torch.manual_seed(0)
    torch.save(mine.Net().state_dict(), tmp_path / "fresh.pth")
    code, out, err = run("slim", *NET, "--weights", "fresh.pth", *SHORT, "--max-macs", "50%",
                         "--output", "first")  # fmt: skip
    assert code == 0, err
    assert (
        "not above chance, so it is trained like a fresh network (a trained one has" in out
        and "given" not in out[-80:]
    )
    history = (tmp_path / "first" / "history.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("lr") or 0 for line in history]
    assert max(rates) > 0.05
