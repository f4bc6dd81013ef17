"""Tiny random models and a byte-level chat tokenizer, made on the spot: what tests use in place of downloads."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("qwen2", "qwen3", "llama")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; ChatML with <|im_end|> at the end of a turn."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    wrapped.chat_template = CHATML
    return wrapped


def tiny_config(family: str, *, tied: bool = True, vocab_size: int = 300, **more: object) -> AutoConfig:
    """Two layers, four query heads over two key/value heads, widths that NF4's blocks of 64 divide."""
    return AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
        **more,
    )


def save_tiny_model(folder: Path, family: str = "qwen2", *, tied: bool = True, seed: int = 0) -> Path:
    """A random model of ``family`` with the tiny tokenizer beside it, as safetensors in float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied=tied))
    for name, parameter in model.named_parameters():
        # Wider than the default, so that attention and logits are far from uniform and mistakes show.
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
