"""Write a small Hugging Face model directory with random weights, to try fine-tuning on.

    python make_tiny_llama.py tiny-llama

It has no tokenizer: `zerompi train` takes bytes as tokens.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=256,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
