"""Pruning inside the Trainer of transformers: budget, momenta, checkpoints, resuming, distillation."""

from __future__ import annotations

import pytest

hf = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch  # noqa: E402
from hf_families import TOKENS, small  # noqa: E402

from pruning import Budget, PruningError, trace  # noqa: E402
from pruning.integrations.transformers import PruningCallback, loadable  # noqa: E402
from pruning.planning import count  # noqa: E402
from pruning.planning.options import PlanOptions  # noqa: E402

pytestmark = pytest.mark.slow

ROWS = [
    {"input_ids": row, "labels": row[0] % 2}
    for row in torch.randint(3, TOKENS, (32, 9), generator=torch.Generator().manual_seed(0))
]


@pytest.fixture(scope="module")
def options():
    model, inputs, outputs = small("bert")
    return PlanOptions(**loadable(model, trace(model, inputs, outputs=outputs), inputs))


def trainer(folder, callback, model=None, logging=100):
    model = small("bert")[0] if model is None else model
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    arguments = hf.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="steps", logging_steps=logging,
    )  # fmt: skip
    return hf.Trainer(model, arguments, train_dataset=ROWS, callbacks=[callback])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, options):
    """Return a training that prunes after steps 2 and 4, and its callback."""
    callback = PruningCallback(Budget(macs="60%"), [2, 4], options=options)
    dense = count(*small("bert")[:2]).macs
    training = trainer(tmp_path_factory.mktemp("run"), callback)  # this seeds the order of the data
    before = training.model
    training.train()
    assert training.model is before
    return training, callback, dense


def test_the_budget_is_met_in_equal_ratios_and_the_optimizer_has_the_pruned_parameters(finished):
    training, callback, dense = finished
    first, last = callback.pruner.steps
    assert last.after.macs <= 0.6 * first.before.macs
    assert 0.6 * first.before.macs < first.after.macs <= 0.6**0.5 * first.before.macs + 1
    assert count(training.model.eval(), small("bert")[1]).macs < 0.65 * dense
    own = {id(parameter) for parameter in training.model.parameters()}
    groups = training.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == own
    for parameter, state in training.optimizer.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape and int(state["step"]) == 6


def test_checkpoints_load_by_from_pretrained(finished):
    training, _, _ = finished
    again = hf.AutoModelForSequenceClassification.from_pretrained(f"{training.args.output_dir}/checkpoint-6")
    inputs = small("bert")[1]
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, training.model.eval()(**inputs).logits)
    width = training.model.bert.encoder.layer[0].intermediate.dense.out_features
    assert again.config.intermediate_size == width < 64


def test_a_training_that_is_resumed_ends_with_the_same_weights(finished, options, tmp_path):
    training, _, _ = finished
    checkpoint = f"{training.args.output_dir}/checkpoint-3"  # between the two pruning steps
    model = hf.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    callback = PruningCallback(Budget(macs="60%"), [2, 4], options=options)
    again = trainer(tmp_path, callback, model)
    again.train(resume_from_checkpoint=checkpoint)
    assert len(callback.pruner.steps) == 1
    expected = training.model.state_dict()
    assert {k: v.shape for k, v in again.model.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }
    for key, value in again.model.state_dict().items():
        assert torch.allclose(value, expected[key], rtol=1e-3, atol=1e-5), key


def test_the_loss_is_that_of_the_teacher_too(tmp_path, options):
    callback = PruningCallback(Budget(macs="60%"), [2], options=options, distill=1.0, temperature=1.0)
    training = trainer(tmp_path, callback, logging=1)
    model = training.model
    training.train()
    losses = [line["loss"] for line in training.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0, abs=1e-5) and losses[2] > 1e-4  # itself; then it is pruned
    assert not model._forward_hooks


def test_bad_settings_are_named(tmp_path, options):
    for at in ([], [0], [3, 2]):
        with pytest.raises(PruningError, match="expected the numbers of the steps"):
            PruningCallback(Budget(macs="60%"), at)
    with pytest.raises(PruningError, match="weight of the teacher"):
        PruningCallback(Budget(macs="60%"), [1], distill=2)
    callback = PruningCallback(Budget(macs="60%"), [1], options=options, distill=0.5)
    training = trainer(tmp_path, callback)
    training.train_dataset = [{"input_ids": row["input_ids"]} for row in ROWS]
    with pytest.raises(PruningError, match="give labels"):
        training.train()
