"""Pruning inside the Trainer of Lightning: budget, momenta, checkpoints that resume after pruning."""

from __future__ import annotations

import pytest

lightning = pytest.importorskip("lightning")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from pruning import Budget, PruningError  # noqa: E402
from pruning.integrations.lightning import PruningCallback, narrow  # noqa: E402
from pruning.stages import PacedPull  # noqa: E402

pytestmark = pytest.mark.slow

IMAGES = torch.randn(2, 1, 8, 8)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.scale * self.model(images), labels)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, torch.arange(16) % 3), batch_size=4
    )


def fitted(folder, epochs, ckpt=None, module=None, **settings):
    callback = PruningCallback(Budget(macs="50%"), [2, 6], IMAGES, **settings)
    module = module or Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, barebones=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback],
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data(), ckpt_path=ckpt)
    return trainer, module, callback


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("whole"), 3)


def test_the_budget_is_met_and_the_optimizer_has_the_pruned_parameters(finished):
    trainer, module, callback = finished
    first, last = callback.pruner.steps
    assert last.after.macs <= 0.5 * first.before.macs < first.after.macs
    optimizer = trainer.optimizers[0]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape and int(state["step"]) == 12
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 8)


@pytest.mark.parametrize("epochs", [1, 2])  # between the pruning steps, and after both
def test_a_training_that_is_resumed_ends_with_the_same_weights(finished, tmp_path, epochs):
    trainer, _, _ = fitted(tmp_path, epochs)
    path = tmp_path / "part.ckpt"
    trainer.save_checkpoint(path)
    _, again, callback = fitted(tmp_path, 3, path)
    assert len(callback.pruner.steps) == (1 if epochs == 1 else 0)
    expected = finished[1].state_dict()
    assert expected.keys() == again.state_dict().keys()
    for key, value in again.state_dict().items():
        assert torch.allclose(value, expected[key], rtol=1e-4, atol=1e-6), key
    checkpoint = torch.load(path, weights_only=True)
    module = Classifier()
    narrow(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    assert module.model[0].out_channels < 8


def test_scales_are_pulled_to_zero_before_the_first_pruning(tmp_path):
    def pull(model, traced, target, steps):
        made.append(PacedPull(model, traced, target, steps))
        return made[0]

    made = []
    _, _, callback = fitted(tmp_path, 1, pull=pull)
    assert callback.pruner.steps and sum(made[0].alive().values()) < 16


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(PruningError, match=r"has no network 'net'; its parts: model"):
        fitted(tmp_path, 1, network="net")
