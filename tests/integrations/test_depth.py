"""Models of transformers without some blocks: their caches, and what the unchanged library loads."""

from __future__ import annotations

import pytest

hf = pytest.importorskip("transformers")

import torch  # noqa: E402
from hf_families import TOKENS, decoder, ids  # noqa: E402

from pruning import Plan, trace  # noqa: E402
from pruning.graph.groups import Trace  # noqa: E402
from pruning.integrations.transformers import load, save_pretrained  # noqa: E402
from pruning.surgery import expert_usage, removable, without_experts, without_layer  # noqa: E402
from pruning.surgery.apply import apply  # noqa: E402

pytestmark = pytest.mark.slow

KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


def gemma():
    sizes = {**decoder(head_dim=8), "num_hidden_layers": 4, "sliding_window": 4, "layer_types": list(KINDS)}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes)), ids()


def t5():
    config = hf.T5Config(
        vocab_size=TOKENS, d_model=8, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), {
        **ids(),
        "decoder_input_ids": torch.randint(3, TOKENS, (2, 5)),
    }


CASES = {
    "gemma": (gemma, ["model.layers.0", "model.layers.2"], {"num_hidden_layers": 2}),
    "t5": (t5, ["decoder.block.1", "decoder.block.2", "encoder.block.1"],
           {"num_layers": 1, "num_decoder_layers": 1}),
}  # fmt: skip


def shortened(case):
    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    make, names, changes = CASES[case]
    model, inputs = make()
    small, found = model.eval(), Trace({}, {}, {}, {}, outputs=["logits"])
    for name in names:
        small = without_layer(small, found, removable(small, found, inputs)[name])
    return model, small, inputs, changes


def generated(model, inputs):
    return model.generate(inputs["input_ids"], max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("case", CASES)
def test_from_pretrained_makes_as_many_blocks(case, tmp_path):
    model, small, inputs, changes = shortened(case)
    saved = save_pretrained(small, tmp_path, inputs, outputs=["logits"])
    assert saved.loadable and saved.changes == changes
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, small(**inputs).logits)
    assert torch.equal(generated(again, inputs), generated(small, inputs))
    if case == "gemma":
        assert again.config.layer_types == [KINDS[1], KINDS[3]]
        assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]


def test_blocks_and_widths_that_differ_have_the_format_of_our_own(tmp_path):
    model, small, inputs, _ = shortened("gemma")
    found = trace(small, inputs, outputs=["logits"], compare=False)
    name = next(name for name in found.groups if name.startswith("model.layers.0.mlp"))
    again = apply(small, found, Plan({name: tuple(range(9))}))
    with pytest.warns(UserWarning, match="intermediate_size"):
        assert not save_pretrained(again, tmp_path, inputs, outputs=["logits"]).loadable
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(**inputs).logits, again(**inputs).logits)
    assert model.config.layer_types == KINDS


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek"])
def test_from_pretrained_makes_as_many_experts(family, tmp_path):
    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    if family == "gpt_oss":
        sizes = {**decoder(head_dim=8), "num_local_experts": 4, "num_experts_per_tok": 2}
        model, number = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes)), "num_local_experts"
    else:
        sizes = {
            **decoder(), "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 12, "kv_lora_rank": 10,
            "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        }  # fmt: skip
        model, number = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes)), "n_routed_experts"
    inputs = ids()
    keep = {n: share.topk(3).indices.tolist() for n, share in expert_usage(model.eval(), [inputs]).items()}
    assert len(keep) == (2 if family == "gpt_oss" else 1)  # the first layer of DeepSeek is dense
    small = without_experts(model, keep, inputs, ["logits"])
    saved = save_pretrained(small, tmp_path, inputs, outputs=["logits"])
    assert saved.loadable and saved.changes[number] == 3
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, small(**inputs).logits)
    assert torch.equal(generated(again, inputs), generated(small, inputs))
