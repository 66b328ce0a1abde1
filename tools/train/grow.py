"""Twice as wide from a trained checkpoint, with the same outputs: where a larger run starts.

HyperCloning (Samragh et al., arXiv 2409.12903, section 3): every vector of the larger model holds the
smaller one's twice, every matrix is [[W, W], [W, W]] / 2. The halves of each row get opposite noise, which
the doubled inputs cancel: the outputs stay, and training does not keep the halves equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from model import LanguageModel, ModelConfig
from torch import Tensor

SEED = 1
# Standard deviation of the noise over that of the doubled weights.
NOISE = 0.7


def doubled(config: ModelConfig) -> ModelConfig:
    """Returns the sizes of a model twice as wide, heads of the same size."""
    return dataclasses.replace(
        config,
        hidden_size=2 * config.hidden_size,
        intermediate_size=2 * config.intermediate_size,
        num_attention_heads=2 * config.num_attention_heads,
        num_key_value_heads=2 * config.num_key_value_heads,
    )


def widen(name: str, weight: Tensor) -> Tensor:
    """Returns a parameter of the larger model: twice the rows and columns, an embedding's columns only."""
    if "embed" in name:
        return weight.repeat(1, 2)
    if weight.ndim == 1:
        # The head is tied: twice the embedding met by twice the hidden state would double the logits.
        return weight.repeat(2) * (0.5 if name == "model.norm.weight" else 1.0)
    half = weight.repeat(2, 1) / 2
    noise = NOISE * half.std() * torch.randn(half.shape)
    return torch.cat((half + noise, half - noise), dim=1)


@torch.no_grad()
def main() -> None:
    """Writes the larger model's weights and says by how much its outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="written by train.py")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    state = torch.load(options.checkpoint, weights_only=True, map_location="cpu")
    config = ModelConfig(**state["config"])
    small, large = LanguageModel(config), LanguageModel(doubled(config))
    small.load_state_dict(state["model"])
    large.load_state_dict({name: widen(name, weight) for name, weight in small.state_dict().items()})
    tokens = torch.randint(config.vocab_size, (1, 128))
    difference = float((small.logits(tokens) - large.logits(tokens)).abs().max())
    if not difference < 1e-2:
        sys.exit(f"grow: the larger model's logits differ by {difference:.3g}")
    torch.save({"config": dataclasses.asdict(large.config), "model": large.state_dict()}, options.out)
    count = sum(weight.numel() for weight in large.parameters())
    print(f"{options.out}: {count:,} parameters, logits within {difference:.2g} of the smaller model's")


if __name__ == "__main__":
    main()
