"""Writes a model of random weights in the shape of Qwen2.5-1.5B-Instruct, for timing where its weights are not at hand.

    python benchmarks/make_random_model.py --tokenizer FOLDER --output FOLDER
    python benchmarks/bench_training.py --model FOLDER --rows 7473 --only ours --data FOLDER

Speed and memory depend on the shape, the tokenizer and the rows, not on the values of the weights; losses and answers
mean nothing. The shape is that of the published config.json (1.54 billion weights, tied embeddings, 3.1 GB).
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

PROJECT_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT_ROOT))

from lib.engine.load import end_of_turn_id, load_tokenizer  # noqa: E402

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with the real tokenizer and its chat template")
    parser.add_argument("--output", required=True, help="folder to write the model to")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer layers, to try it out")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    shape = {**SHAPE, "num_hidden_layers": arguments.layers}
    config = Qwen2Config(**shape, eos_token_id=end_of_turn_id(tokenizer), pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_weights / 1e9:.2f} billion random weights in {arguments.output}")


if __name__ == "__main__":
    main()
