"""Write a Llama checkpoint of random bfloat16 weights, from which the other programs convert their models.

    PYTHON checkpoint.py DIR --shape 1.1b

Runs in a Python that has torch and transformers. Speed depends on the shape, not on the values; the tokenizer
is a dummy of the right size, since only token ids are ever given to the models.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20
CONTEXT_TOKENS = 16384

SHAPES = {
    "1.1b": {
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "135m": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}


def dummy_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with words that never occur behind its bytes."""
    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"word{index}" for index in range(vocab_size - len(pieces))]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def main() -> None:
    """Write weights, configuration and tokenizer."""
    parser = argparse.ArgumentParser(description="Write a Llama checkpoint of random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        **SHAPES[args.shape],
        max_position_embeddings=CONTEXT_TOKENS,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).save_pretrained(args.out)
    dummy_tokenizer(config.vocab_size).save_pretrained(args.out)
    # The name that transformers 4, which CTranslate2's converter needs, knows too.
    path = args.out / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")


if __name__ == "__main__":
    main()
