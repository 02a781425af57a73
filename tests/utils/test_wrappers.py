"""Models inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pruning import Budget, PruningError, doctor, load, prune, save, trace
from pruning.cli.factories import load_weights
from pruning.load_pruned import load_pruned
from pruning.planning import CostModel
from pruning.surgery.apply import apply
from pruning.utils.wrappers import unwrapped

IMAGES = torch.randn(2, 3, 8, 8)


def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))


class Average(nn.Module):
    """An average of another library, which has no code of its own."""

    def __init__(self, model):
        super().__init__()
        self.module = model


WRAPPERS = {
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: AveragedModel(nn.DataParallel(model)),
    "foreign": Average,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_pruned_as_the_model_inside_and_loads_by_its_factory(name, tmp_path):
    dense = net()
    wrapped = WRAPPERS[name](dense)
    step = prune(wrapped, IMAGES, Budget(macs="50%"), score="l2")
    expected = prune(unwrapped(wrapped), IMAGES, Budget(macs="50%"), score="l2")
    assert step.plan == expected.plan and doctor(wrapped, IMAGES).groups[0].name == "0"
    save(tmp_path / "small.pth", WRAPPERS[name](step.model))
    for again in (
        load(tmp_path / "small.pth", net),
        load_pruned(tmp_path / "small.pth", net),
        unwrapped(load(tmp_path / "small.pth", lambda: WRAPPERS[name](net()))),
    ):
        assert torch.equal(again(IMAGES), expected.model.eval()(IMAGES))
        assert again.state_dict().keys() == net().state_dict().keys()


def test_functions_that_take_a_trace_take_the_wrapped_model_too():
    wrapped = nn.DataParallel(net())
    plan = prune(wrapped, IMAGES, Budget(macs="50%"), score="l2").plan
    traced = trace(wrapped, IMAGES)
    small = apply(wrapped, traced, plan)
    assert small[0].out_channels == plan.widths["0"]
    assert CostModel(wrapped, traced)(plan.widths).params == sum(
        p.numel() for name, p in small.named_parameters() if not name.startswith("1.")
    ) + len(small[0].weight) * (small[0].bias is None)


def test_wrapped_submodules_leave_no_prefixes(tmp_path):
    class Net(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.features, self.head = wrap(net()), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.features(x).mean((2, 3)))

    model = Net(nn.DataParallel)
    step = prune(model, IMAGES, Budget(macs="60%"), score="l2", ignored=["features.module.3"])
    assert step.plan.widths.keys() == {"features.0"}
    assert isinstance(model.features, nn.DataParallel), "the given model is not changed"
    save(tmp_path / "small.pth", step.model)
    again = load(tmp_path / "small.pth", lambda: Net(lambda inner: inner))
    assert torch.equal(again(IMAGES), step.model.eval()(IMAGES))


def test_layers_are_ignored_by_the_names_of_the_wrapped_model():
    for ignored in ("module.0", "0", nn.DataParallel):
        with pytest.raises(PruningError, match=r"no prunable group|matches no layer"):
            prune(nn.DataParallel(net()), IMAGES, Budget(macs="50%"), score="l2", ignored=[ignored])


def test_a_module_with_code_of_its_own_is_no_wrapper():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net()

        def forward(self, x):
            return self.module(x / 2)

    model = Normalized()
    assert unwrapped(model) is model
    assert trace(model, IMAGES).widths == {"module.0": 16}


def test_programs_of_torch_export_and_sharded_models_are_refused_in_words():
    program = torch.export.export(net().eval(), (IMAGES,))
    for model in (program.module(), torch.export.unflatten(program), nn.Sequential(program.module())):
        with pytest.raises(PruningError, match=r"torch.export.*give the nn.Module that it was made from"):
            prune(model, IMAGES, Budget(macs="50%"), score="l2")
    with pytest.raises(PruningError, match="an ExportedProgram: give an instance"):
        trace(program, IMAGES)
    sharded = type("FullyShardedDataParallel", (Average,), {})
    with pytest.raises(PruningError, match="before it is sharded"):
        trace(sharded(net()), IMAGES)


@pytest.mark.parametrize("wrap", [None, *WRAPPERS.values()])
@pytest.mark.parametrize("keys", [(), ("model_ema",), ("state_dict", "ema"), ("net",)])
def test_files_of_weights_load_whatever_wrapped_the_model_and_the_weights(wrap, keys, tmp_path):
    trained = net()
    content = (wrap(trained) if wrap else trained).state_dict()
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    for model in (net(), nn.DataParallel(net())):
        load_weights(model, tmp_path / "weights.pth")
        assert torch.equal(unwrapped(model)[0].weight, trained[0].weight)
