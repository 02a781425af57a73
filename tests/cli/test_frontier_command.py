"""`python -m pruning frontier` and `prune --plan`."""

from __future__ import annotations

import json
import re

import pytest
from user import NET

from pruning import load

WORDS = ("frontier", *NET, "--points", 4, "--refit", "--calibration", 60)


def test_the_plan_of_a_point_makes_its_network_again(run, tmp_path):
    code, out, err = run(*WORDS, "--output", "out", "--drop", 1)
    assert code == 0, err
    assert len(re.findall(r"^ +\d+\.?\d*%: .* accuracy \d\.\d{4} \(", out, re.M)) == 4
    assert "the smallest point with a drop of accuracy of at most 1: " in out
    found = json.loads((tmp_path / "out" / "frontier.json").read_text())["frontier"]
    point = found["points"][1]
    plan = {**point["plan"], "frontier": {"refit": True}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    given = ("prune", *NET, "--calibration", 60, "--plan", "plan.json")
    code, out, err = run(*given, "--refit", "--output", "a.pth")
    assert code == 0 and "judged" not in out, err
    assert f"{point['cost']['macs']:,} MACs (asked plan.json)" in out
    assert f"without training: {found['dense']['metrics']['accuracy'][0]:.4f} before, " in out
    assert f"{point['metrics']['accuracy'][0]:.4f} after" in out
    assert (
        run(
            "prune", *NET, "--calibration", 60, "--refit", "--max-macs", point["budget"], "--output", "b.pth"
        )[0]
        == 0
    )
    first, second = load("a.pth").state_dict(), load("b.pth").state_dict()
    assert all((first[name] == second[name]).all() for name in first | second)
    assert "was judged with a refit; to get that network, add --refit" in run(*given, "--output", "c.pth")[1]
    before = (tmp_path / "out" / "frontier.json").read_bytes()
    assert run(*WORDS, "--output", "out")[0] == 0
    assert (tmp_path / "out" / "frontier.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--score", "l3"), "argument --score: invalid choice: 'l3'"),
        (("--points", 1), "argument --points: '1': expected a whole number from 2"),
        (("--budgets", "50%"), "a frontier needs at least two budgets: give more points or budgets"),
        (("--budgets", "50%", "2M"), "budget 2M: the dense network has 6,936 MACs; give budgets of at most"),
        (("--budgets", "50%", "half"), "macs budget 'half': expected a count"),
        (("--data", "mine:few"), "'mine:few' gave no validation batches"),
        (("--data", "mine:unbounded"), "outputs on validation batch 0 are not finite"),
        (("--runtime", "onnxruntime"), "are for networks that are timed: add --timed, or --limit latency"),
        (("--output", "other"), "other holds another run: choose another folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, tmp_path, words, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    code, _, err = run("frontier", *NET, "--score", "l2", *words)
    assert code == 2 and message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "frontier").exists()


def test_a_folder_of_other_settings_and_files_without_a_plan_are_refused(run, tmp_path):
    words = ("frontier", *NET, "--budgets", "80%", "60%", "--score", "l2")
    assert run(*words)[0] == 0
    code, _, err = run(*words, "--most", 0.5)
    assert code == 2 and "frontier.json is the frontier of other settings: most 0.9, now 0.5" in err
    assert run("frontier", "--model", "mine:Net")[2].startswith("error: data is needed")
    for content in ("", "[]", "{}", '{"keep": {"features.0": []}}', '{"keep": 3}'):
        (tmp_path / "plan.json").write_text(content)
        code, _, err = run("prune", *NET, "--plan", "plan.json")
        assert code == 2 and ("holds no plan" in err or "would keep no channel" in err), (content, err)
    (tmp_path / "plan.json").write_text('{"keep": {"no": [0]}}')
    assert "names group 'no', which this model does not have" in run("prune", *NET, "--plan", "plan.json")[2]
    both = run("prune", *NET, "--plan", "plan.json", "--max-macs", "50%")
    assert both[0] == 2 and "--plan takes the place of a budget" in both[2]
