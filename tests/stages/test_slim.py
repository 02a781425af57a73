"""The three stages as one pipeline: budgets, law 7 (determinism and resuming), runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import nets
import pytest
import torch
from killed import CopiedRun, Killed
from nets import ShuffledBatches, batches, same

from pruning import Budget, PruningError, SlimConfig, prune, slim, trace
from pruning.planning import count
from pruning.stages import PruneConfig, Run
from pruning.stages.finetune import tune
from pruning.stages.scales import ChannelScales
from pruning.training import TrainConfig, accuracy

CONFIG = SlimConfig(
    Budget(params="30%", macs="50%"), sparsify=TrainConfig(2, lr=0.05),
    prune=PruneConfig(2, TrainConfig(1, lr=0.02), layers=True),
    finetune=TrainConfig(2, lr=0.05, ema=0.5), distill=0.3,
)  # fmt: skip


def pipeline(run=None, log=lambda _: None, config=CONFIG):
    torch.manual_seed(0)
    data = batches()
    return slim(nets.make("lenet"), ShuffledBatches(), data[0][0], config,
                validate=lambda m: accuracy(m, data), calibration=data, run=run, log=log)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run that was not interrupted, its lines and its folder, and its earlier states."""
    folder, copies, lines = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("copies"), []
    return pipeline(CopiedRun(folder, {"seed": 0}, copies), lines.append), lines, folder, copies


def test_slimming_meets_the_budget_and_reports_each_step(whole):
    result, lines, folder, _ = whole
    got, before = (
        ChannelScales(net, trace(net, nets.images())).dense for net in (result.model, result.dense)
    )
    assert got.params <= 0.3 * before.params + 0.5 and got.macs <= 0.5 * before.macs + 0.5
    assert [line.split(":")[0] for line in lines if "whole layers" not in line] == [
        "given network", "stage 1, sparsify", "stage 2, iteration 1/2", "stage 2, iteration 2/2",
        "stage 3, fine-tune",
    ]  # fmt: skip
    assert all("asked ≤" in line for line in lines[-3:-1]) and f"{got.params:,} params" in lines[-2]
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert sum("epoch" in event for event in events) == CONFIG.epochs == 6
    assert [event["params"] for event in events if "asked" in event][-1] == got.params


def test_restart_trains_the_last_stage_from_fresh_weights(whole, tmp_path):
    config = replace(CONFIG, restart=True)
    result, kept = pipeline(Run(tmp_path / "whole", {}), config=config), whole[0]
    assert not same(result.model, kept.model)
    assert same(result.dense, kept.dense), "stage 1 does not depend on it"

    def killed(line):
        if line.startswith("stage 2, iteration 2/2"):
            raise Killed

    with pytest.raises(Killed):
        pipeline(Run(tmp_path / "cut", {}), killed, config)
    torch.manual_seed(12345)
    assert same(pipeline(Run(tmp_path / "cut", {}, resume=True), config=config).model, result.model)


def test_tuning_keeps_the_start_if_no_epoch_is_better_and_resumes_to_the_same_result(tmp_path):
    net, data = nets.make("lenet"), batches()
    start = nets.snapshot(net)
    good = lambda m: float(all(torch.equal(value, start[key]) for key, value in m.state_dict().items()))  # noqa: E731
    run = Run(tmp_path / "run", {})
    assert good(tune(net, data, TrainConfig(2, lr=0.05), validate=good, run=run)) == 1
    assert good(tune(net, data, TrainConfig(2, lr=0.05), validate=good, run=Run(run.folder, {}, resume=True)))


def test_the_same_seed_gives_the_same_network(whole):
    assert same(pipeline().model, whole[0].model)


@pytest.mark.parametrize("epochs", range(1, 7))
def test_an_interrupted_pipeline_resumes_to_the_same_result(whole, epochs):
    expected, _, folder, copies = whole
    cut = copies / str(epochs)
    torch.manual_seed(12345)
    resumed = pipeline(Run(cut, {"seed": 0}, resume=True))
    assert same(resumed.model, expected.model) and same(resumed.dense, expected.dense)
    assert (folder / "history.jsonl").read_text() == (cut / "history.jsonl").read_text()


def test_the_folder_of_another_run_is_rejected(tmp_path):
    Run(tmp_path / "run", {"seed": 0})
    with pytest.raises(PruningError, match="already holds a run"):
        Run(tmp_path / "run", {"seed": 0})
    with pytest.raises(PruningError, match=r"other settings \(seed\)"):
        Run(tmp_path / "run", {"seed": 1}, resume=True)
    with pytest.raises(PruningError, match="no run to resume"):
        Run(tmp_path / "elsewhere", {"seed": 0}, resume=True)


def test_an_unreachable_budget_is_rejected_before_training(tmp_path):
    config = SlimConfig(Budget(params=5), TrainConfig(1), PruneConfig(1, TrainConfig(1)), TrainConfig(1))
    with pytest.raises(PruningError, match="cannot be reached"):
        pipeline(Run(tmp_path / "run", {}), config=config)
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_slim_runs_with_only_a_budget_and_batches():
    torch.manual_seed(0)
    labels = torch.arange(32) % 4
    batches = [(torch.randn(32, 3, 14, 14) + labels[:, None, None, None], labels)]
    lines = []
    result = slim(nets.make("lenet"), batches, budget=Budget(macs="40%"), validate=batches, log=lines.append)
    before, after = (count(net, batches[0][0]).macs for net in (nets.make("lenet"), result.model))
    assert after <= 0.4 * before and result.epochs == 8 + 5 * 2 + 40
    assert lines[-1].startswith("stage 3, fine-tune: 40 epochs")
    with pytest.raises(PruningError, match="either a config or a budget"):
        slim(nets.make("lenet"), batches, validate=batches)


IMAGES, LABELS = torch.zeros(2, 3, 14, 14), torch.zeros(2, dtype=torch.long)


def test_invalid_batches_and_validation_figures_are_rejected_by_slim():
    config = SlimConfig.within(Budget(params="50%"))
    net, given = nets.make("lenet"), batches()
    with pytest.raises(PruningError, match="an iterator that can be read only once"):
        slim(net, iter(given), config=config, validate=given)
    for batch, said in (
        ({"image": IMAGES, "label": LABELS}, "a dict with 'image', 'label'"),
        (IMAGES, "a batch is a Tensor"),
        ((IMAGES, LABELS, 1), "a batch is a tuple of 3"),
    ):
        with pytest.raises(PruningError, match=said):
            slim(net, [batch], config=config, validate=given)
    with pytest.raises(PruningError, match="the given batches are empty"):
        slim(net, [], config=config, validate=given)
    with pytest.raises(PruningError, match="validate returned None"):
        slim(net, given, config=config, validate=lambda _: None, log=lambda _: None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"validate": None}, "validate is a NoneType: give a function of the model, or batches"),
        ({"validate": iter([])}, "batches that can be read after every epoch"),
        ({"validate": [(batches(1)[0][0], torch.zeros(16))]}, "the targets are torch.float32"),
        ({"teacher": nets.LeNet5((2,), (3,), image_shape=(3, 14, 14), classes=7)}, "teacher's outputs"),
        ({"model": nets.LeNet5}, "the model is the class LeNet5: give an instance"),
        ({"frozen": True}, "has no prunable group .*frozen"),
    ],
)
def test_invalid_arguments_are_rejected_before_training(given, said):
    class Untouched:
        def __iter__(self):
            for batch in batches(1):
                yield batch
                raise AssertionError("training began")

        def __len__(self):
            return 1

    model = given.pop("model", None) or nets.make("lenet")
    if given.pop("frozen", False):
        model.requires_grad_(False)
    options = {"validate": batches(1), "calibration": batches(1), **given}
    with pytest.raises(PruningError, match=said):
        slim(model, Untouched(), batches(1)[0][0], CONFIG, **options)


@pytest.mark.parametrize("budget", ["50%", None, 100])
def test_a_value_that_is_not_a_budget_is_rejected(budget):
    with pytest.raises(PruningError, match=r"expected a Budget, such as Budget\(macs='50%'\)"):
        prune(nets.make("lenet"), nets.images(), budget)


def test_a_run_resumes_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    Run(tmp_path / "run", {}).save({"stage": 0})
    assert Run(tmp_path / "run", {}, resume=True).state["stage"] == 0


def test_a_run_that_another_process_uses_is_rejected(tmp_path):
    Run(tmp_path / "run", {})
    other = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print(1, flush=True); input()"
    words = [sys.executable, "-c", other, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(PruningError, match="another process is writing to this run"):
            Run(tmp_path / "run", {}, resume=True)
    Run(tmp_path / "run", {}, resume=True)


class Several(torch.nn.Module):
    """Returns features beside the logits, and encodes by a method that reads a width."""

    def __init__(self):
        super().__init__()
        self.width, self.first = 8, torch.nn.Linear(4, 16)
        self.middle, self.last = torch.nn.Linear(16, 8), torch.nn.Linear(8, 2)

    def forward(self, x):
        features = torch.relu(self.middle(torch.relu(self.first(x))))
        return {"logits": self.last(features), "features": features}

    def encode(self, n):
        return self.last(self.middle(torch.ones(n, self.middle.in_features)).view(n, self.width))


def test_stages_follow_the_outputs_that_count_and_other_calls():
    data = [(torch.randn(16, 4), torch.arange(16) % 2)]
    one = TrainConfig(1)
    config = SlimConfig(Budget(params="40%"), sparsify=one, prune=PruneConfig(1, one), finetune=one)
    small = slim(
        Several(), data, config=config, validate=lambda _: 0.0, log=lambda _: None,
        outputs=["logits"], also=[lambda model: model.encode(3)],
    ).model  # fmt: skip
    assert small.middle.out_features == small.width < 8 and small.encode(3).shape == (3, 2)
    with pytest.raises(PruningError, match="'logit' matches none"):
        slim(Several(), data, config=config, validate=lambda _: 0.0, outputs=["logit"])
