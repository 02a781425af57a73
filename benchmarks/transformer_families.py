"""Prune small models of many families of transformers, and load them by the library: docs/families.md.

    python -m pip install transformers
    python -m benchmarks.transformer_families
    python -m benchmarks.transformer_families --networks LlamaForCausalLM --results again.json --page again.md

Each class of transformers makes a model from its default configuration with small numbers and random
weights. One `prune` step takes it to half of its MACs, the same share of every group, with the check of
equivalence; heads and residual widths are groups like others. A second step does so with widths that a
configuration can state (`loadable`). `save_pretrained` writes the result, and a fresh process that does not
import this toolkit loads it by `from_pretrained`, compares the logits, and generates. Where half is out of
reach, the least that all groups allow is stated. Each model runs in its own process. Each result is saved at
once, and existing results are not computed again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.process import result_or_error
from benchmarks.results import read_json, table, write_json
from eval.cli import ROOT
from pruning import Budget, PruningError, Trace, cli, prune, trace
from pruning.graph.layers import is_weighted, weight_of
from pruning.planning.cost import Cost, CostModel
from pruning.utils.files import replace_file
from pruning.utils.tree import tensors

#: Timeout for a model, in seconds.
PATIENCE = 300

#: The share of MACs to keep, and larger ones that are tried with widths that a configuration can state.
SHARE, LOADABLE = 0.5, (0.5, 0.6, 0.7, 0.8, 0.9)

#: Numbers that a configuration gets where it has them.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "qk_rope_head_dim"), 4),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "v_head_dim", "qk_nope_head_dim", "patch_size"), 8),
    **dict.fromkeys(("state_size", "num_mel_bins"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "embedding_size"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "image_size"), 32),
    **dict.fromkeys(("vocab_size", "intermediate_size", "ffn_dim", "d_ff", "d_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

#: Numbers of models with latent attention, where SMALL would contradict itself.
LATENT = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}

#: Classes of transformers, by kind, with further numbers of their configurations.
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "encoders of text": {
        "BertForMaskedLM": {}, "RobertaForMaskedLM": {}, "AlbertForMaskedLM": {},
        "DistilBertForMaskedLM": {}, "ElectraForMaskedLM": {}, "DebertaForMaskedLM": {},
        "DebertaV2ForMaskedLM": {}, "MPNetForMaskedLM": {}, "XLNetForSequenceClassification": {},
        "FunnelForMaskedLM": {}, "LongformerForMaskedLM": {"attention_window": 4}, "IBertForMaskedLM": {},
        "MobileBertForMaskedLM": {}, "SqueezeBertForMaskedLM": {"embedding_size": 32},
        "ModernBertForMaskedLM": {},
    },
    "decoders": {
        "GPT2LMHeadModel": {}, "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
        "GPTNeoXForCausalLM": {},
        "GPTJForCausalLM": {"rotary_dim": 4}, "OPTForCausalLM": {"word_embed_proj_dim": 32},
        "BloomForCausalLM": {}, "FalconForCausalLM": {}, "MptForCausalLM": {}, "LlamaForCausalLM": {},
        "MistralForCausalLM": {}, "Qwen2ForCausalLM": {}, "Qwen3ForCausalLM": {}, "GemmaForCausalLM": {},
        "Gemma2ForCausalLM": {}, "PhiForCausalLM": {}, "Phi3ForCausalLM": {}, "StableLmForCausalLM": {},
        "OlmoForCausalLM": {}, "Olmo2ForCausalLM": {}, "CohereForCausalLM": {}, "GraniteForCausalLM": {},
        "Starcoder2ForCausalLM": {}, "GPTBigCodeForCausalLM": {},
    },
    "decoders with experts, latent attention or states": {
        "MixtralForCausalLM": {}, "Qwen2MoeForCausalLM": {}, "GptOssForCausalLM": {},
        "OlmoeForCausalLM": {"num_experts_per_tok": 2},
        "DeepseekV2ForCausalLM": {**LATENT}, "DeepseekV3ForCausalLM": {**LATENT, "head_dim": 4},
        "MambaForCausalLM": {}, "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    },
    "encoders with decoders": {
        "T5ForConditionalGeneration": {}, "BartForConditionalGeneration": {},
        "PegasusForConditionalGeneration": {}, "MarianMTModel": {"decoder_start_token_id": 0},
        "MBartForConditionalGeneration": {},
        "BlenderbotForConditionalGeneration": {},
        "WhisperForConditionalGeneration": {
            "max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1,
            "suppress_tokens": None, "begin_suppress_tokens": None,
        },
    },
    "images": {
        "ViTForImageClassification": {}, "DeiTForImageClassification": {}, "BeitForImageClassification": {},
        "SwinForImageClassification": {
            "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4,
        },
        "Dinov2ForImageClassification": {}, "PvtForImageClassification": {},
        "ViTMAEForPreTraining": {
            "decoder_hidden_size": 32, "decoder_intermediate_size": 64, "decoder_num_attention_heads": 4,
            "decoder_num_hidden_layers": 2,
        },
        "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "PoolFormerForImageClassification": {
            "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
            "strides": [4, 2], "padding": [2, 1],
        },
        "SegformerForImageClassification": {
            "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1],
            "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
        },
    },
    "videos": {
        "TimesformerForVideoClassification": {"num_frames": 4},
        "VideoMAEForVideoClassification": {"num_frames": 4, "patch_size": 16},
    },
    "sound": {
        "Wav2Vec2ForCTC": {}, "HubertForCTC": {}, "WavLMForCTC": {},
        "ASTForAudioClassification": {"max_length": 64, "num_mel_bins": 32, "patch_size": 16},
    },
    "images and text": {"CLIPModel": {}},
}  # fmt: skip

#: Loads folders by transformers alone, and stores the outputs and the generated tokens in them.
READ = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    config = json.load(open(f"{folder}/config.json"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    given = torch.load(f"{folder}/given.pt", weights_only=True)
    torch.manual_seed(0)
    with torch.no_grad():
        got = {"output": model(**given)[0]}
        if model.can_generate():
            first = next(iter(given.values()))
            got["tokens"] = model.generate(first, max_new_tokens=3, do_sample=False)
    torch.save(got, f"{folder}/got.pt")
assert "pruning" not in sys.modules
"""


def main() -> None:
    names = [name for networks in NETWORKS.values() for name in networks]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "families.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--threads", type=cli.whole_number(1), default=1, help="CPU threads")
    parser.add_argument("--draw", action="store_true", help="only draw existing results")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        print("\n" + json.dumps(tried(args.one)))
        return
    version = importlib.metadata.version("transformers")
    results = read_json(args.results, {"transformers": version, "networks": {}})
    for name in () if args.draw else args.networks:
        if name not in results["networks"]:
            flags = ["--one", name, "--threads", str(args.threads)]
            results["networks"][name] = found = result_or_error("transformer_families", flags, PATIENCE)
            write_json(args.results, results)
            print(name, found.get("error") or found.get("reason") or "loads", flush=True)
    replace_file(args.page, page(results).encode())


def made(name: str) -> nn.Module:
    """Return a small model of a class, with random weights, in eval mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind = getattr(transformers, name)
    own = next(networks[name] for networks in NETWORKS.values() if name in networks)

    def numbers(config: Any) -> dict[str, Any]:
        taken = {
            key: value
            for key, value in SMALL.items()
            if key.endswith("token_id") or type(getattr(config, key, None)) is int
            if not isinstance(getattr(type(config), key, None), property)
        }
        return {**taken, **own}

    default = kind.config_class()
    parts = {key: getattr(default, key) for key in ("text_config", "vision_config") if hasattr(default, key)}
    config = kind.config_class(**numbers(default), **{key: numbers(part) for key, part in parts.items()})
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():  # outputs then depend on attention
        for parameter in (p for p in model.parameters() if p.requires_grad):  # others are computed
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tried(name: str) -> dict[str, Any]:
    """Prune a model in both ways and load it again; raises `PruningError` where a step fails."""
    from pruning.integrations.transformers import example_inputs, loadable

    warnings.simplefilter("ignore")
    model = made(name)
    inputs = example_inputs(model)
    outputs = ["logits_per_image"] if name == "CLIPModel" else ["logits"]
    found = trace(model, inputs, outputs=outputs)
    cost = CostModel(model, found)
    full, least = cost(cost.full), cost({group: found.groups[group].multiple for group in cost.groups})
    result: dict[str, Any] = {
        "params": full.params, "in groups": in_groups(model, found),
        "least params": least.params / full.params, "least macs": least.macs / full.macs,
    }  # fmt: skip

    def step(share: float, **constraints: Any) -> tuple[nn.Module, Cost]:
        done = prune(
            model, inputs, Budget(macs=f"{share:.0%}"), score="l2", ranking="group", most=1.0,
            outputs=outputs, **constraints,
        )  # fmt: skip
        return done.model, done.after

    try:
        after = step(SHARE)[1]
        result |= {"share params": after.params / full.params, "share macs": after.macs / full.macs}
    except PruningError as error:
        result["half"] = str(error)
    try:
        constraints = loadable(model, found, inputs)
    except PruningError as error:
        return {**result, "reason": str(error)}
    for share in LOADABLE:
        try:
            small, after = step(share, **constraints)
        except PruningError as error:
            result["reason"] = str(error)
            continue
        result["loadable macs"] = after.macs / full.macs
        result |= read_again(small, inputs, outputs)
        break
    return result


def read_again(small: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: list[str]) -> dict[str, Any]:
    """Save a pruned model, load it in a fresh process, and compare the logits and the generated tokens."""
    from pruning.integrations.transformers import save_pretrained

    with tempfile.TemporaryDirectory() as folder:
        saved = save_pretrained(small, folder, inputs, outputs=outputs)
        if not saved.loadable:
            return {"reason": saved.reason}
        torch.save(dict(inputs), f"{folder}/given.pt")
        done = subprocess.run(
            [sys.executable, "-c", READ, folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"reason": (done.stderr.strip() or "killed").splitlines()[-1]}
        got = torch.load(f"{folder}/got.pt", weights_only=True)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = tensors(small(**inputs)[0])[0]
        scale = float(expected.abs().max())
        result: dict[str, Any] = {"difference": float((expected - got["output"]).abs().max()) / scale}
        if "tokens" in got:
            tokens = small.generate(next(iter(inputs.values())), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
            result["generates"] = bool(torch.equal(tokens, got["tokens"]))
    return result


def in_groups(model: nn.Module, found: Trace) -> float:
    """Return the share of weight elements that some group's removal would remove."""
    inside = total = 0
    for name, layer in model.named_modules():
        if not is_weighted(layer) or (weight := weight_of(layer)) is None:
            continue
        kept = []
        for side, size in zip(("out", "in"), weight.shape[:2], strict=True):
            held = {
                int(i)
                for group in found.groups.values()
                for member in group.members
                if member.layer == name and member.side == side
                for i in member.index
            }
            kept.append(1 - min(1.0, len(held) / size))
        inside += round((1 - prod(kept)) * weight.numel())
        total += weight.numel()
    return inside / max(1, total)


def page(results: Mapping[str, Any]) -> str:
    """Return the page of all models, as Markdown."""
    found = results["networks"]
    complete = [row for row in found.values() if "error" not in row]
    halved = sum("share macs" in row for row in complete)
    loads = sum("difference" in row for row in complete)
    lines = [
        "# Families of transformers",
        "",
        f"Small models of transformers {results['transformers']} with random weights, made by `python -m",
        "benchmarks.transformer_families`, which says what is done. *In groups* is the share of weight",
        "elements that the removal of some group would remove. *Half* and *least* are the shares of params",
        "and MACs that are left: at half of the MACs, and with all groups at their least width. *Loads* is",
        "the share of MACs left with widths that a configuration can state, where a fresh process without",
        "this toolkit loads the folder and its outputs are equal up to rounding.",
        "",
        f"{len(found)} models: {halved} pruned to half of their MACs; {loads} load again.",
        "",
    ]
    heads = ["model", "params", "in groups", "half", "least", "loads", "generates"]
    for kind, names in NETWORKS.items():
        rows, reasons = [], []
        for name in names:
            if (row := found.get(name)) is None:
                continue

            def shares(*keys: str, row: Mapping[str, Any] = row) -> str:
                return " / ".join(f"{100 * row[key]:.0f}%" for key in keys if key in row)

            loaded = shares("loadable macs") if "difference" in row else ""
            generates = {True: "yes", False: "differs"}.get(row.get("generates"), "")
            cells = [
                shares("in groups"), shares("share params", "share macs"),
                shares("least params", "least macs"), loaded, generates,
            ]  # fmt: skip
            rows.append([name, f"{row.get('params', 0):,}", *cells])
            for why in (row.get("error"), row.get("half"), None if loaded else row.get("reason")):
                reasons += [f"- {name}: {why if len(why) < 300 else why[:300] + '…'}"] if why else []
        if rows:
            lines += [
                f"## {kind.capitalize()}",
                "",
                *table(heads, rows),
                *reasons,
                *([""] if reasons else []),
            ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    cli.run(main)
