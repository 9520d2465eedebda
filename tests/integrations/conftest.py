"""Tiny random encoders, one of each family, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from tests.device import device_type

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 99, "max_position_embeddings": 300}

# of models with an encoder and a decoder
TWO_SIDES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
}

BUILDERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99, max_position_embeddings=300)
    ),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**TEXT, embedding_size=32)),
    "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)),
    "eurobert": lambda: hf.EuroBertModel(  # rotary embeddings and grouped queries
        hf.EuroBertConfig(
            **TEXT, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3
        )
    ),
    "nomic": lambda: hf.NomicBertModel(hf.NomicBertConfig(**TEXT)),
    "bart": lambda: hf.BartModel(
        hf.BartConfig(
            **TWO_SIDES,
            max_position_embeddings=300,
        )
    ),
    "whisper": lambda: hf.WhisperModel(
        hf.WhisperConfig(
            **TWO_SIDES,
            num_mel_bins=8,
            max_source_positions=150,
            max_target_positions=40,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            init_std=0.3,  # so large that attention matters
        )
    ),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(
            **TEXT,
            layer_types=["full_attention", "sliding_attention"],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=32, patch_size=4)),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)),
    "t5": lambda: hf.T5EncoderModel(hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
    "clip_text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT, bos_token_id=1, eos_token_id=2)),
    "gpt2": lambda: hf.GPT2Model(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2)
    ),
}


@pytest.fixture
def build() -> Callable[..., Any]:
    """build("bert") -> a tiny random model in evaluation mode, the same at every call."""

    def make(family: str, attention: str | None = None) -> Any:
        torch.manual_seed(0)
        model = BUILDERS[family]().eval().to(device_type())
        if attention is not None:
            model.set_attn_implementation(attention)
        return model

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two token sequences, of 50 and of 31 tokens."""
    ids = torch.randint(5, 99, (2, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 31:] = 0
    return {"input_ids": ids, "attention_mask": mask}
