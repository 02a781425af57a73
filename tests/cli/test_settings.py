"""The settings: every flag, file key and default comes from the field of a dataclass."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
from commands import ROOT, refused, script
from user import NET

from eval import train_flags
from pruning import Budget, LatencyBudget, PruningError, SlimConfig
from pruning.cli import argument_types, parse_flags
from pruning.cli.arguments import GROUPS
from pruning.cli.build import slim_config
from pruning.cli.commands import prune as prune_command
from pruning.cli.commands.results import settings
from pruning.cli.main import parse
from pruning.utils.settings import Setting, require_valid

BUDGET = ("--max-macs", "50%")
EARLIER = Path(__file__).with_name("earlier_run")

#: The settings of each recipe: the budget, fields that differ from their defaults, and other flags.
PAPER = {
    "sparsify_epochs": 160,
    "iterations": 1,
    "recover_epochs": 0,
    "score": "bn_scale",
    "finetune_epochs": 160,
    "finetune_rate": 0.1,
    "weight_decay": 1e-4,
}
RECIPES = {
    "recipes/cifar10-densenet40.toml": (
        Budget("34.8%", "45%"),
        PAPER,
        {"model": "models:densenet40", "data": "cifar10", "device": "cuda"},
    ),
    "recipes/cifar10-resnet164.toml": (
        Budget("64.8%", "55.1%"),
        PAPER,
        {"model": "models:resnet164", "data": "cifar10", "device": "cuda"},
    ),
    "recipes/cifar10-vgg19.toml": (
        Budget("11.5%", "49%"),
        PAPER,
        {"model": "models:vgg19", "data": "cifar10", "device": "cuda"},
    ),
    "recipes/short.toml": (
        Budget(macs="50%"),
        {
            "sparsify_epochs": 3,
            "iterations": 2,
            "recover_epochs": 1,
            "finetune_epochs": 3,
            "finetune_rate": 0.1,
        },
        {
            "data": "data:loaders",
            "data_arg": ["name=fashion-mnist", "size=32", "train=4000", "validation=1000"],
            "calibration": 512,
        },
    ),
    "checkpoints/accurate/recipe.toml": (
        Budget("60074", "199968"),
        {"layers": True, "finetune_epochs": 50, "weight_decay": 5e-4},
        {"start": "lenet5-wide", "augment": 1.0},
    ),
    "checkpoints/atom/recipe.toml": (
        Budget("697"),
        {
            "sparsify_epochs": 5,
            "iterations": 3,
            "finetune_epochs": 60,
            "finetune_rate": 0.06,
            "optimizer": "soap",
            "restart": True,
        },
        {"start": "separable", "batch_size": 128, "augment": 0.5},
    ),
    "checkpoints/caffe/recipe.toml": (
        Budget("2792", "153k"),
        {"layers": True, "sparsify_epochs": 5, "finetune_epochs": 100, "finetune_rate": 0.1},
        {"start": "lenet5-caffe", "augment": 0.25},
    ),
    "checkpoints/caffe-macs/recipe.toml": (
        Budget(macs="111k"),
        {"sparsify_epochs": 5, "finetune_epochs": 100, "finetune_rate": 0.1},
        {"start": "lenet5-caffe", "augment": 0.25},
    ),
    "checkpoints/compact/recipe.toml": (
        Budget("3762", "621k"),
        {"finetune_epochs": 80, "weight_decay": 5e-4, "channels_last": True},
        {"start": "compact", "augment": 1.0},
    ),
    "checkpoints/mlp/recipe.toml": (
        Budget("10%"),
        {"finetune_epochs": 60},
        {"start": "mlp", "augment": 1.0},
    ),
    "checkpoints/mlp-sensitivity/recipe.toml": (
        Budget("10%"),
        {"finetune_epochs": 60, "score": "sensitivity"},
        {"start": "mlp", "augment": 1.0},
    ),
    "checkpoints/nano/recipe.toml": (
        Budget("1485", "47.4k"),
        {"layers": True, "finetune_rate": 0.1, "restart": True},
        {"start": "lenet5", "augment": 0.5},
    ),
    "checkpoints/nano/mnist5k.toml": (
        Budget("1485", "47.4k"),
        {
            "layers": True,
            "sparsify_epochs": 24,
            "recover_epochs": 6,
            "finetune_epochs": 240,
            "finetune_rate": 0.1,
        },
        {"start": "lenet5", "augment": 1.0},
    ),
    "checkpoints/small/recipe.toml": (
        Budget("5000", "100k"),
        {"layers": True, "finetune_epochs": 50},
        {"start": "lenet5", "augment": 0.5},
    ),
}


def expected(
    budget,
    sparsify_epochs=8,
    recover_epochs=2,
    finetune_epochs=40,
    finetune_rate=0.2,
    weight_decay=1e-3,
    channels_last=False,
    optimizer="sgd",
    restart=False,
    **pruning,
):
    """Return the settings of `slim` with every default written out."""
    each = {
        "momentum": 0.9,
        "weight_decay": weight_decay,
        "schedule": "one-cycle",
        "warmup": 0.2,
        "ema": 0.0,
        "channels_last": channels_last,
    }
    recover = {"epochs": recover_epochs, "lr": 0.05, "optimizer": "sgd", **each}
    steps = {
        "iterations": 5,
        "score": "taylor",
        "layers": False,
        "ranking": "global",
        "floor": None,
        "most": 1.0,
        "multiple": 1,
        "recover": recover,
        **pruning,
    }
    limits = {"params": budget.params, "macs": budget.macs, "channels": budget.channels}
    return {
        "budget": limits,
        "sparsify": {"epochs": sparsify_epochs, "lr": 0.1, "optimizer": "sgd", **each},
        "prune": steps,
        "finetune": {"epochs": finetune_epochs, "lr": finetune_rate, "optimizer": optimizer, **each},
        "strength": None,
        "distill": 0.0,
        "temperature": 4.0,
        "restart": restart,
    }


def test_every_committed_recipe_has_expected_settings():
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/*.toml")}
    found |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("checkpoints/*/*.toml")}
    assert found == RECIPES.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_committed_recipe_gives_the_expected_settings(recipe, monkeypatch):
    budget, stages, others = RECIPES[recipe]
    monkeypatch.setattr("torch.empty", lambda *size, device: None)  # accept every device
    if recipe.startswith("recipes"):
        args, _ = parse(["slim", "--config", str(ROOT / recipe)])
        defaults = {"model": None, "device": "cpu", "calibration": 2048}
    else:
        args = train_flags.arguments(["--recipe", str(ROOT / recipe)])
        defaults = {"teacher": None, "data": "auto", "threads": 2}
    defaults |= {"batch_size": 64, "seed": 0, "ignore": []}
    assert slim_config(args).with_rates().to_json() == expected(budget, **stages)
    assert {name: getattr(args, name) for name in defaults | others} == defaults | others


def test_the_config_file_of_an_earlier_run_gives_the_same_settings():
    args, _ = parse(["slim", "--config", str(EARLIER / "slim.toml")])
    assert settings(args) == json.loads((EARLIER / "slim.json").read_text())


def test_an_earlier_run_of_train_yournet_is_resumed_with_the_same_settings(tmp_path):
    shutil.copy(EARLIER / "train_yournet.json", tmp_path / "config.json")
    args = train_flags.arguments(["--resume", "--output", str(tmp_path)])
    kept = train_flags.settings(args, args.data, slim_config(args))
    assert kept == json.loads((EARLIER / "train_yournet.json").read_text())
    assert args.output == tmp_path
    more = train_flags.arguments(["--resume", "--output", str(tmp_path), "--seed", "7"])
    assert vars(more) == {**vars(args), "seed": 7}, "the command line takes precedence"


def test_the_defaults_of_the_flags_are_those_of_the_dataclasses():
    args, _ = parse(["slim", *BUDGET])
    config = slim_config(args)
    default = SlimConfig(Budget(macs="50%"))
    assert config == default
    args, _ = parse(["slim", *BUDGET, "--optimizer", "soap"])
    rate = slim_config(args).with_rates().finetune.lr
    assert rate == 0.05, "the learning rate of stage 3 depends on its optimizer"
    args, _ = parse(["slim", "--max-latency", "0.5x"])
    assert slim_config(args).budget == LatencyBudget("0.5x", batch_size=1)


def test_a_flag_applies_to_all_stages_or_to_one():
    words = ("--weight-decay", "0.5", "--channels-last", "--ema", "0.9", "--recover-rate", "0.25")
    args, _ = parse(["slim", *BUDGET, *words])
    config = slim_config(args)
    trained = (config.sparsify, config.prune.recover, config.finetune)
    assert [t.weight_decay for t in trained] == [0.5] * 3 and all(t.channels_last for t in trained)
    assert [t.ema for t in trained] == [0, 0, 0.9] and [t.lr for t in trained] == [None, 0.25, None]
    trained = config.with_rates()
    rates = [trained.sparsify.lr, trained.prune.recover.lr, trained.finetune.lr]
    assert rates == [0.1, 0.25, 0.2], "those of an untrained network"
    args, _ = parse(["slim", *BUDGET, "--rate", "0.04", "--recover-rate", "0.25"])
    given = slim_config(args).with_rates(0.001, 0.003)
    assert [given.sparsify.lr, given.prune.recover.lr, given.finetune.lr] == [0.04, 0.25, 0.04]


def test_the_help_of_slim_groups_flags_by_stage_with_units_and_defaults(toolkit):
    code, out, _ = toolkit("slim", "--help")
    places = [out.index(f"\n{title}:\n") for title in GROUPS.values()]
    assert code == 0 and places == sorted(places)
    text = " ".join(out.split())
    assert "--sparsify-epochs N training epochs; 0 trains nothing (default: 8)" in text
    assert "peak learning rate (default: 0.2 with sgd, 0.05 with soap)" in text
    assert "0 trains without it (default: auto)" in text


@dataclass(frozen=True, kw_only=True)
class Example:
    count: Annotated[int, Setting("number of examples", metavar="N", least=1, most=9)] = 3
    share: Annotated[float | None, Setting("share of them, or none", above=0, below=1, none="none")] = None
    kind: Annotated[str, Setting("kind of them", choices=("old", "new"))] = "old"
    names: Annotated[list[str] | None, Setting("their names", metavar="NAME")] = None
    quick: Annotated[bool, Setting("be quick")] = True
    secret: Annotated[int, Setting("not on the command line", least=0, flag=False)] = 5

    def __post_init__(self):
        require_valid(self)


def test_a_new_field_becomes_a_flag_with_its_default_bounds_and_help(capsys):
    words = ["--count", "4", "--share", "0.5", "--names", "a", "--names", "b", "c", "--no-quick"]
    found, _ = parse_flags(Example, "Examples.", words)
    assert found == Example(count=4, share=0.5, names=["a", "b", "c"], quick=False)
    assert parse_flags(Example, "Examples.", ["--share", "none"])[0] == Example()
    for flag, value, said in (
        ("--count", "0", "expected a whole number from 1 to 9"),
        ("--count", "2.5", "expected a whole number from 1 to 9"),
        ("--share", "1", "expected a number above 0 and below 1, or none"),
        ("--share", "nan", "expected a number above 0 and below 1, or none"),
        ("--kind", "odd", "invalid choice: 'odd' (choose from"),
        ("--secrets", "1", "unrecognized arguments: --secrets 1"),
        ("--kinds", "old", "did you mean --kind?"),
    ):
        with pytest.raises(SystemExit) as end:
            parse_flags(Example, "Examples.", [flag, value])
        error = capsys.readouterr().err
        assert end.value.code == 2 and flag in error and said in error
        assert len(error.splitlines()) == 1
    with pytest.raises(SystemExit):
        parse_flags(Example, "Examples.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--count N number of examples (default: 3)" in text and "secret" not in text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"count": 0}, "Example.count 0: expected a whole number from 1 to 9"),
        ({"count": 1.5}, "Example.count 1.5: expected a whole number"),
        ({"count": "3"}, "Example.count '3': expected a whole number"),
        ({"share": float("nan")}, "Example.share nan: expected a number above 0 and below 1"),
        ({"kind": "odd"}, "Example.kind 'odd': expected one of old, new"),
        ({"secret": -1}, "Example.secret -1: expected a whole number from 0"),
    ],
)
def test_settings_are_validated_when_created_in_python(bad, message):
    with pytest.raises(PruningError) as error:
        Example(**bad)
    assert message in str(error.value)


def test_values_of_the_wrong_type_in_a_config_file_are_refused(run, tmp_path):
    for line, said in (
        ("max-macs = true", "max-macs is a bool"),
        ("layers = 1", "--layers"),
        ("iterations = 0", "--iterations: '0': expected a whole number from 1"),
        ("iteration = 2", "did you mean 'iterations'"),
    ):
        (tmp_path / "run.toml").write_text(line + "\n")
        code, _, err = run("slim", *NET, "--config", "run.toml")
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err


def test_an_unknown_flag_suggests_the_nearest_one(run):
    code, _, err = run("slim", *NET, "--max-mcas", "50%")
    assert code == 2 and "unrecognized arguments: --max-mcas 50%; did you mean --max-macs?" in err
    assert "did you mean --augment?" in refused("train_yournet.py", "--augmnet", 1)


def test_errors_of_the_toolkit_are_not_reported_as_errors_of_the_user(run, monkeypatch):
    """This holds if the user's network raises them, because it ran before the toolkit changed it."""

    def broken(model, *args, **options):
        return model(torch.zeros(1, 9, 9, 9))  # simulates surgery that removed the wrong channels

    monkeypatch.setattr(prune_command, "prune", broken)
    with pytest.raises(RuntimeError, match="to have 1 channels, but got 9"):
        run("prune", *NET, *BUDGET)


def test_errors_in_user_networks_are_reported_with_their_location(run):
    words = ("--model", "mine:Stumbles", "--data", "mine:digits")
    for command in ("slim", "finetune"):
        budget = BUDGET if command == "slim" else ()
        code, _, err = run(command, *words, *budget, "--output", "run")
        assert code == 2 and "Stumbles does not run in training mode: AttributeError" in err
        assert "mine.py, line" in err and "in forward)" in err
    code, _, err = run("test", "--model", "mine:Net", "--data", "mine:wide")
    assert code == 2 and "Net does not run on the example inputs: RuntimeError" in err and "mine.py" in err
    assert run("prune", *words, *BUDGET)[0] == 0, "prune does not train"


def test_errors_in_user_data_are_reported_at_any_batch(run):
    code, _, err = run("prune", "--model", "mine:Net", "--data", "mine:ending", *BUDGET)
    assert code == 2 and "data 'mine:ending' cannot be read: OverflowError: no more (" in err
    assert "mine.py, line" in err and len(err.strip().splitlines()) == 1


def test_the_help_of_a_script_comes_from_its_dataclass(tmp_path):
    text = " ".join(script("train_lenet5.py", "--help").stdout.split())
    assert "--epoch-end N epochs trained in the end (default: 6)" in text
    assert Path("runs") == argument_types.RUNS
