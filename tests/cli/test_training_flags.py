"""Flags of training: optimizer, schedule, precision; on the command line and in configuration files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from user import NET, image_folder

from pruning.cli.build import slim_config
from pruning.cli.config_file import read_recipe
from pruning.cli.main import parse
from pruning.cli.preprocessing import Preprocessing
from pruning.cli.sources import make_data
from pruning.training import TrainConfig, fit
from pruning.utils.modules import copied

BUDGET = ("--max-macs", "50%")
SHORT = ("--sparsify-epochs", 1, "--recover-epochs", 1, "--finetune-epochs", 2, "--iterations", 1)


def stages(*words):
    config = slim_config(parse(["slim", *BUDGET, *words])[0])
    return config.sparsify, config.prune.recover, config.finetune


def test_an_optimizer_trains_every_stage_and_soap_the_last_one_alone():
    words = ("--optimizer", "AdamW", "--optimizer-arg", "betas=0.9,0.98", "eps=1e-6", "--clip-norm", "1")
    for stage in stages(*words, "--schedule", "step", "--milestones", "0.8", "0.4", "--warmup", "0.1"):
        assert (stage.optimizer, stage.optimizer_args) == ("adamw", {"betas": (0.9, 0.98), "eps": 1e-6})
        assert (stage.schedule, stage.milestones, stage.warmup, stage.clip_norm) == (
            "step", (0.4, 0.8), 0.1, 1.0,
        )  # fmt: skip
    first, second, last = stages("--optimizer", "soap", "--optimizer-arg", "memory=0.98")
    assert (last.optimizer, last.optimizer_args) == ("soap", {"memory": 0.98})
    assert [(stage.optimizer, stage.optimizer_args) for stage in (first, second)] == [("sgd", {})] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optimizer", "adamv"), "did you mean 'adam"),
        (("--optimizer", "adamw", "--optimizer-arg", "beta=1"), "did you mean 'betas'"),
        (("--schedule", "cosin"), "did you mean cosine?"),
        (("--precision", "fp16"), "precision fp16 needs a GPU"),
        (("--accumulate", 1000), "accumulate 1000 is larger than the epoch"),
        (("--optimizer", "rprop"), "rprop has no weight decay"),
        (("--warmup", "0"), "schedule cosine"),
        (("--milestones", "1.5"), "above 0 and below 1"),
    ],
)
@pytest.mark.parametrize("command", ["slim", "finetune"])
def test_bad_settings_are_refused_in_one_line_before_there_is_a_run(run, tmp_path, command, words, message):
    limits = BUDGET if command == "slim" else ()
    code, _, err = run(command, *NET, *limits, *words, "--output", "out")
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_slim_trains_with_the_given_settings_and_repeats_them_from_its_file(run, tmp_path):
    words = ("--optimizer", "adamw", "--optimizer-arg", "betas=0.8,0.9", "--schedule", "cosine",
             "--warmup", 0.1, "--clip-norm", 1, "--accumulate", 2, "--precision", "bf16",
             "--label-smoothing", 0.1, "--distill", 0.5, "--distill-features", "head")  # fmt: skip
    code, _, err = run("slim", *NET, *BUDGET, *SHORT, *words, "--output", "one")
    assert code == 0, err
    settings = json.loads((tmp_path / "one" / "config.json").read_text())
    assert settings["optimizer"] == "adamw" and settings["optimizer_arg"] == ["betas=0.8,0.9"]
    assert "mixup" not in settings and "milestones" not in settings, "later flags only where they are given"
    lines = [json.loads(line) for line in (tmp_path / "one" / "history.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert len(rates) == 4 and max(rates) <= 1e-3, "the default rate of the optimizer"
    again = parse(["slim"])[0].parser
    flags = read_recipe(tmp_path / "one" / "config.toml", again)
    assert slim_config(parse(["slim", *flags])[0]) == slim_config(
        parse(["slim", *map(str, (*NET, *BUDGET, *SHORT, *words))])[0]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--int8", "--compile"), "compiled networks leave out the hooks"),
        (("--distill-features", "head"), "give --teacher and --distill"),
    ],
)
def test_settings_of_finetune_that_exclude_each_other_are_refused(run, tmp_path, words, message):
    code, _, err = run("finetune", *NET, *words, "--output", "out")
    assert code == 2 and message in err and not (tmp_path / "out").exists(), err


def test_finetune_takes_the_default_rate_of_the_optimizer(run, tmp_path):
    for optimizer, rate in (("adamw", 1e-3), ("sgd", 0.05)):
        words = ("--epochs", 1, "--optimizer", optimizer, "--schedule", "constant", "--output", optimizer)
        code, _, err = run("finetune", *NET, *words)
        assert code == 0, err
        lines = (tmp_path / optimizer / "history.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["lr"] == rate


def test_images_that_workers_read_are_the_same_in_a_resumed_training(tmp_path):
    image_folder(tmp_path / "pictures", ["a", "bcd"])
    chosen = Preprocessing.chosen({"crop": 16, "augment": "crop"}, None)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))

    def train(resume=None):
        data = make_data(str(tmp_path / "pictures"), batch_size=8, preprocessing=chosen, workers=1)
        model, states = copied(start), []
        torch.manual_seed(1 if resume is None else 2)
        fit(model, data.train, TrainConfig(3, 0.01), resume=resume,
            validate=lambda net: float(len([*data.validation])),
            on_epoch=lambda epoch: states.append(copy.deepcopy(epoch.state())))  # fmt: skip
        return model, states

    whole, states = train()
    assert torch.equal(whole[1].weight, train(states[0])[0][1].weight)
