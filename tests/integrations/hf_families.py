"""Small networks of transformers with random weights, and inputs for them."""

from __future__ import annotations

import torch
import transformers as hf

TOKENS = 40


def ids(rows=2, tokens=9):
    return {"input_ids": torch.randint(3, TOKENS, (rows, tokens))}


def pixels():
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def encoder(**more):
    return dict(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        **more,
    )


def decoder(**more):
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return encoder(num_key_value_heads=2, **{**ends, **more})


FAMILIES = {
    "bert": lambda: (hf.BertForSequenceClassification(hf.BertConfig(**encoder())), ids()),
    "distilbert": lambda: (
        hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=TOKENS, dim=16, n_layers=2, n_heads=4, hidden_dim=64)
        ),
        ids(),
    ),
    "roberta": lambda: (hf.RobertaForTokenClassification(hf.RobertaConfig(**encoder())), ids()),
    "gpt2": lambda: (
        hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=TOKENS,
                n_embd=16,
                n_layer=2,
                n_head=4,
                n_positions=32,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        ids(),
    ),
    "opt": lambda: (
        hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=TOKENS,
                hidden_size=16,
                word_embed_proj_dim=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
                max_position_embeddings=32,
            )
        ),
        ids(),
    ),
    "bloom": lambda: (
        hf.BloomForCausalLM(
            hf.BloomConfig(
                vocab_size=TOKENS, hidden_size=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
            )
        ),
        ids(),
    ),
    "llama": lambda: (hf.LlamaForCausalLM(hf.LlamaConfig(**decoder(head_dim=8))), ids()),
    "mixtral": lambda: (
        hf.MixtralForCausalLM(
            hf.MixtralConfig(**decoder(num_local_experts=4, num_experts_per_tok=2, head_dim=4))
        ),
        ids(),
    ),
    "mistral": lambda: (hf.MistralForCausalLM(hf.MistralConfig(**decoder(head_dim=8))), ids()),
    "qwen2": lambda: (hf.Qwen2ForCausalLM(hf.Qwen2Config(**decoder(tie_word_embeddings=True))), ids()),
    "qwen3": lambda: (hf.Qwen3ForCausalLM(hf.Qwen3Config(**decoder(head_dim=8))), ids()),
    "gemma": lambda: (hf.GemmaForCausalLM(hf.GemmaConfig(**decoder(head_dim=8))), ids()),
    "phi3": lambda: (hf.Phi3ForCausalLM(hf.Phi3Config(**decoder())), ids()),
    "t5": lambda: (
        hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=TOKENS,
                d_model=8,
                d_kv=4,
                d_ff=64,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
            )
        ),
        {**ids(), "decoder_input_ids": torch.randint(3, TOKENS, (2, 5))},
    ),
    "vit": lambda: (
        hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=16,
                patch_size=8,
            )
        ),
        pixels(),
    ),
    "swin": lambda: (
        hf.SwinForImageClassification(
            hf.SwinConfig(
                embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2, patch_size=4, image_size=16
            )
        ),
        pixels(),
    ),
    "poolformer": lambda: (
        hf.PoolFormerForImageClassification(
            hf.PoolFormerConfig(
                hidden_sizes=[8, 16],
                depths=[1, 1],
                num_encoder_blocks=2,
                patch_sizes=[7, 3],
                strides=[4, 2],
                padding=[2, 1],
            )
        ),
        pixels(),
    ),
    "marian": lambda: (
        hf.MarianMTModel(
            hf.MarianConfig(
                vocab_size=TOKENS,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=32,
                pad_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=0,
            )
        ),
        {**ids(), "decoder_input_ids": torch.randint(3, TOKENS, (2, 5))},
    ),
    "clip": lambda: (
        hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**encoder(), "num_hidden_layers": 1, "eos_token_id": 2, "bos_token_id": 1},
                vision_config={
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "intermediate_size": 64,
                    "image_size": 16,
                    "patch_size": 8,
                },
                projection_dim=8,
            )
        ),
        {**ids(), **pixels()},
    ),
    "whisper": lambda: (
        hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=TOKENS,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                num_mel_bins=8,
                max_source_positions=10,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        ),
        {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(3, TOKENS, (2, 5))},
    ),
}


def small(family):
    """Return a network in eval mode, inputs for it, and the names of the outputs that count."""
    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    with torch.no_grad():  # outputs then depend on attention
        for parameter in (p for p in model.parameters() if p.requires_grad):  # others are computed
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval(), inputs, ["logits_per_image" if family == "clip" else "logits"]
