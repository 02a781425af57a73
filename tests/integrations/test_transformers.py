"""Pruned models of transformers, and what the unchanged library makes of their files."""

from __future__ import annotations

import json
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest

hf = pytest.importorskip("transformers")

import torch  # noqa: E402
from hf_families import FAMILIES, small  # noqa: E402

from benchmarks.transformer_families import READ  # noqa: E402
from pruning import Budget, Plan, PruningError, trace  # noqa: E402
from pruning.errors import CheckpointError  # noqa: E402
from pruning.integrations.transformers import constraints, example_inputs, load, loadable, save_pretrained  # noqa: E402
from pruning.planning.cost import CostModel  # noqa: E402
from pruning.planning.options import PlanOptions  # noqa: E402
from pruning.planning.search import plan_within  # noqa: E402
from pruning.surgery.apply import apply  # noqa: E402

pytestmark = pytest.mark.slow

#: The least share of MACs to which the test prunes; by default 0.6.
SHARES = {"t5": 0.8, "clip": 0.8, "whisper": 0.8, "marian": 0.8}


@pytest.fixture(scope="module")
def traced():
    """Return a family's model, inputs, outputs and trace, each made once."""
    made = {}

    def find(family):
        if family not in made:
            model, inputs, outputs = small(family)
            made[family] = model, inputs, outputs, trace(model, inputs, outputs=outputs, compare=False)
        return made[family]

    return find


@pytest.fixture(scope="module")
def saved(tmp_path_factory, traced):
    """Prune a family under the constraints of `loadable`, and save it; return the dense and pruned models."""
    made = {}

    def find(family):
        if family not in made:
            model, inputs, outputs, found = traced(family)
            cost, share = CostModel(model, found), SHARES.get(family, 0.6)
            scores = {
                name: torch.rand(g.channels, generator=torch.Generator().manual_seed(1))
                for name, g in found.groups.items()
            }
            limit = Budget(macs=f"{share:.0%}").resolve(cost(cost.full))
            plan = plan_within(limit, found, cost, scores, PlanOptions(**loadable(model, found, inputs)))
            pruned = apply(model, found, plan)
            folder = tmp_path_factory.mktemp(family)
            result = save_pretrained(pruned, folder, inputs, outputs=outputs)
            made[family] = pruned, inputs, result, cost(plan.widths).macs / cost(cost.full).macs
        return made[family]

    return find


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_loads_the_pruned_model_with_the_same_logits(family, saved):
    pruned, inputs, result, share = saved(family)
    assert result.loadable and result.changes and share <= SHARES.get(family, 0.6)
    again = type(pruned).from_pretrained(result.folder).eval()
    with torch.no_grad():
        expected, got = pruned(**inputs), again(**inputs)
    key = "logits_per_image" if family == "clip" else "logits"
    assert torch.allclose(expected[key], got[key], rtol=1e-4, atol=1e-4 * expected[key].abs().max())
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in pruned.parameters())


def test_a_fresh_process_without_the_toolkit_loads_and_generates(saved):
    families = ["bert", "gpt2", "llama", "qwen3", "vit", "t5"]
    for family in families:
        _, inputs, result, _ = saved(family)
        torch.save(inputs, result.folder / "given.pt")
    folders = [str(saved(family)[2].folder) for family in families]
    subprocess.run([sys.executable, "-c", READ, *folders], check=True, timeout=300)
    for family in families:
        pruned, inputs, result, _ = saved(family)
        with torch.no_grad():
            expected = pruned(**inputs)[0]
            got = torch.load(result.folder / "got.pt", weights_only=True)
            assert torch.allclose(expected, got["output"], rtol=1e-4, atol=1e-4 * expected.abs().max())
            if pruned.can_generate():
                made = pruned.generate(next(iter(inputs.values())), max_new_tokens=3, do_sample=False)
                assert torch.equal(made, got["tokens"])


def test_load_finds_class_and_configuration(saved):
    pruned, inputs, result, _ = saved("llama")
    again = load(result.folder)
    assert type(again) is type(pruned) and not again.training
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, pruned(**inputs).logits, rtol=1e-4, atol=1e-4)


def narrowed(model, found, keep):
    return apply(model, found, Plan({name: tuple(range(n)) for name, n in keep.items()}))


def test_the_residual_width_and_that_of_heads_keep_one_share_in_bert(traced, tmp_path):
    model, inputs, outputs, found = traced("bert")
    widths = {n: g.channels for n, g in found.groups.items() if n.endswith("/width") or g.channels == 16}
    small = apply(model, found, Plan({name: tuple(range(n * 3 // 4)) for name, n in widths.items()}))
    assert small.bert.encoder.layer[0].attention.self.num_attention_heads == 4
    result = save_pretrained(small, tmp_path, inputs, outputs=outputs)
    assert result.loadable and result.changes == {"hidden_size": 12}
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, small(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_heads_their_width_and_frequencies_of_positions_are_stated(traced, tmp_path):
    model, inputs, outputs, found = traced("llama")
    width = next(name for name in found.groups if name.endswith("/width"))
    heads = [name for name in found.groups if name.endswith("/heads")]
    keep = {width: (0, 3), **dict.fromkeys(heads, (1,))}  # pairs 0 and 3 of the frequencies
    pruned = apply(model, found, Plan(keep))
    result = save_pretrained(pruned, tmp_path, inputs, outputs=outputs)
    assert result.changes == {"head_dim": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        long = torch.randint(3, 30, (1, 30))
        assert torch.allclose(again(long).logits, pruned(long).logits, rtol=1e-3, atol=1e-3)
    assert torch.allclose(again.model.rotary_emb.inv_freq, pruned.model.rotary_emb.inv_freq, rtol=1e-5)
    dense = model.model.rotary_emb.inv_freq
    assert torch.allclose(again.model.rotary_emb.inv_freq, dense[[0, 3]], rtol=1e-5)


def test_layers_of_different_widths_have_a_format_of_their_own(traced, tmp_path):
    model, inputs, outputs, found = traced("bert")
    names = [name for name in found.groups if name.endswith("intermediate.dense")]
    pruned = narrowed(model, found, {names[0]: 11, names[1]: 7})
    with pytest.warns(UserWarning, match=r"intermediate_size would have to be 7 for .*; 11 for "):
        result = save_pretrained(pruned, tmp_path, inputs, outputs=outputs)
    assert not result.loadable and result.difference < 1e-6
    assert not (tmp_path / "model.safetensors").exists()
    again = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, pruned(**inputs).logits)
    with pytest.raises(PruningError, match=r"alike=\[\.\.\.\]"):
        save_pretrained(pruned, tmp_path / "strict", inputs, outputs=outputs, strict=True)
    assert not (tmp_path / "strict" / "config.json").exists()


def test_tied_weights_stay_tied_in_both_formats(traced, tmp_path):
    model, inputs, outputs, found = traced("qwen2")
    names = [name for name in found.groups if name.endswith("gate_proj")]
    for folder, widths in (("plain", (9, 9)), ("own", (9, 8))):
        pruned = narrowed(model, found, dict(zip(names, widths, strict=True)))
        if folder == "own":
            with pytest.warns(UserWarning, match="intermediate_size"):
                save_pretrained(pruned, tmp_path / folder, inputs, outputs=outputs)
        else:
            assert save_pretrained(pruned, tmp_path / folder, inputs, outputs=outputs).loadable
        again = load(tmp_path / folder)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        with torch.no_grad():
            assert torch.allclose(again(**inputs).logits, pruned(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_other_files_of_the_folder_and_the_model_are_left_alone(traced, tmp_path):
    model, inputs, outputs, found = traced("llama")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name in found.groups if name.endswith("gate_proj")]
    pruned = narrowed(model, found, dict.fromkeys(names, 8))
    pruned.generation_config.max_new_tokens = 5
    assert save_pretrained(pruned, tmp_path, inputs, outputs=outputs).changes == {"intermediate_size": 8}
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert load(tmp_path).generation_config.max_new_tokens == 5
    assert model.config.intermediate_size == pruned.config.intermediate_size == 64
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_groups_that_no_number_describes_keep_their_channels(traced):
    model, inputs, _, found = traced("bert")
    constraints = loadable(model, found, inputs)
    assert constraints["alike"] == [
        "bert.encoder.layer.*.intermediate.dense",
        # The width of a head is hidden_size / num_attention_heads.
        "bert.embeddings.word_embeddings,bert.pooler.dense,bert.encoder.layer.*.attention.self.query/width",
    ]
    assert {name for name in found.groups if "/heads" in name} == constraints["widths"].keys()
    model, inputs, _, found = traced("t5")
    alike = loadable(model, found, inputs)["alike"]
    wi = "encoder.block.*.layer.*.DenseReluDense.wi,decoder.block.*.layer.*.DenseReluDense.wi"
    assert wi in alike, "one number, d_ff, describes both"
    assert [one.count(".q/heads") for one in alike if one.endswith("/heads")] == [3], "num_heads, as well"


def alike_groups(model, found, inputs):
    """Return the sets of groups that are to be alike."""
    every = loadable(model, found, inputs)["alike"]
    return [{n for n in found.groups for part in one.split(",") if fnmatchcase(n, part)} for one in every]


def test_widths_that_the_class_computes_from_one_number_keep_one_share(traced):
    model, inputs, _, found = traced("bloom")  # 4 * hidden_size, hidden_size / n_head
    assert alike_groups(model, found, inputs) == [set(found.groups)]
    model, inputs, _, found = traced("swin")  # mlp_ratio; embed_dim, 2 * embed_dim, embed_dim / num_heads
    mlps = {name for name in found.groups if name.endswith(".mlp.fc1")}
    heads = {name for name in found.groups if name.endswith("/heads")}
    assert len(mlps) == len(heads) == 2
    assert alike_groups(model, found, inputs) == [mlps, found.groups.keys() - mlps - heads]
    model, inputs, _, found = traced("poolformer")  # one mlp_ratio: either MLPs, or all widths of a stage
    stages = alike_groups(model, found, inputs)
    assert len(stages) == 2 and set.union(*stages) == set(found.groups)
    assert all(sum(name.endswith(".conv1") for name in stage) == 1 for stage in stages)


def test_groups_whose_widths_are_multiples_are_tried_with_these(traced):
    model, inputs, _, found = traced("mixtral")
    assert {found.groups[n].multiple for n in found.groups if "experts" in n or "embed" in n} == {4}
    assert not loadable(model, found, inputs)["widths"]


def test_sets_that_no_configuration_describes_together_are_left_out(traced, monkeypatch):
    model, inputs, _, found = traced("gpt2")
    apart = constraints._Trials.reason
    refuse = {"transformer.h.0.mlp.c_fc", "transformer.wte"}

    def reason(self, sets, removed=None):
        together = {name for names in sets for name in names}
        return "these exclude one another" if refuse <= together else apart(self, sets, removed)

    assert refuse <= {name for one in alike_groups(model, found, inputs) for name in one}
    monkeypatch.setattr(constraints._Trials, "reason", reason)
    kept = {name for one in alike_groups(model, found, inputs) for name in one}
    assert len(refuse & kept) == 1


def test_a_width_that_the_class_computes_is_named_with_its_factor(traced, tmp_path):
    model, inputs, outputs, found = traced("bloom")
    names = [name for name in found.groups if name.endswith("dense_h_to_4h")]
    pruned = narrowed(model, found, dict.fromkeys(names, 40))
    with pytest.warns(
        UserWarning, match=r"dense_h_to_4h\.\w+\[0\].* \(which the class makes 4 \* hidden_size\)"
    ):
        assert not save_pretrained(pruned, tmp_path, inputs, outputs=outputs).loadable


def test_tensors_that_files_lack_are_never_other_than_the_model_has(traced, tmp_path):
    model, inputs, outputs, found = traced("marian")
    widths = {n: g.channels for n, g in found.groups.items() if n.endswith("/width") or g.channels == 16}
    pruned = narrowed(model, found, {name: n // 2 for name, n in widths.items()})
    with pytest.warns(
        UserWarning, match=r"stores no model\.\w+\.embed_positions\.weight, and computes other"
    ):
        result = save_pretrained(pruned, tmp_path, inputs, outputs=outputs)
    assert not result.loadable
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(**inputs).logits, pruned(**inputs).logits)
    assert loadable(model, found, inputs)["widths"].keys() == {
        name for name in found.groups if ".fc1" not in name
    }


@pytest.mark.parametrize("family", ["bert", "whisper", "clip", "t5"])
def test_example_inputs_are_made_from_the_configuration(family, traced):
    model, inputs, _, _ = traced(family)
    made = example_inputs(model)
    assert made.keys() == inputs.keys()
    with torch.no_grad():
        model(**made)


def test_bad_input_is_named(tmp_path, traced):
    with pytest.raises(PruningError, match="Linear is no PreTrainedModel"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)
    model = traced("bert")[0]
    with pytest.raises(PruningError, match="does not run on the example inputs"):
        save_pretrained(model, tmp_path, {"nothing": torch.zeros(1)})
    own = tmp_path / "own"
    model.config.save_pretrained(own)
    (own / "pruned.json").write_text(json.dumps({"format": 99, "class": "x:y"}))
    with pytest.raises(CheckpointError, match="update the toolkit"):
        load(own)
    (own / "pruned.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        load(own)


def test_a_model_without_a_limit_of_tokens_gets_example_inputs():
    config = hf.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=32)
    assert config.max_position_embeddings == -1
    assert example_inputs(hf.XLNetForSequenceClassification(config))["input_ids"].shape == (2, 12)


def test_example_inputs_are_videos_spectrograms_or_images_of_any_size_where_the_model_takes_these():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    timesformer = hf.TimesformerConfig(**sizes, image_size=16, patch_size=8, num_frames=3)
    spectrogram = hf.ASTConfig(**sizes, max_length=32, num_mel_bins=16, patch_size=8)
    resnet = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    for model, shape in [
        (hf.TimesformerForVideoClassification(timesformer), (2, 3, 3, 16, 16)),
        (hf.ASTForAudioClassification(spectrogram), (2, 32, 16)),
        (hf.ResNetForImageClassification(resnet), (2, 3, 64, 64)),
    ]:
        (given,) = example_inputs(model).values()
        assert given.shape == shape
        with torch.no_grad():
            model(given)
