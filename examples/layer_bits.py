"""A width for each layer: which ones carry the answer? python examples/layer_bits.py [MODEL]."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import taper
from taper.precision import LayerBits, StepContext


@dataclass(frozen=True)
class OneLayerLow:
    """All bits, but for one layer in every decode step."""

    num_layers: int
    layer: int
    low: int

    @property
    def name(self) -> str:
        """For the record of a run."""
        return f"layer {self.layer} at {self.low}"

    def bits(self, step: StepContext) -> int | LayerBits:
        """The prompt at all bits; then the layer at `low`."""
        if step.phase == "prefill":
            return step.max_bits
        layers = [step.max_bits] * self.num_layers
        layers[self.layer] = self.low
        return LayerBits(tuple(layers), step.max_bits)


def main() -> None:
    """Audit an answer once for each layer."""
    llm = taper.load(sys.argv[1] if len(sys.argv) > 1 else None)
    layers = llm.config.num_layers
    answer = llm.generate("Once upon a time", policy=f"fixed:{llm.max_bits}", max_tokens=48)
    for layer in range(layers):
        policy = OneLayerLow(layers, layer, llm.min_bits)
        audit = llm.audit(answer.prompt_ids, answer.token_ids, policy=policy).audit
        assert audit is not None
        print(f"{policy.name} bits: mean KL {audit.mean_kl:.5f} nats, top-1 {audit.top1_share:.0%}")


if __name__ == "__main__":
    main()
