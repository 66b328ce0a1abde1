"""One transformer layer: attention and the gated feed-forward network, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from taper.kvcache import KvLayer
from taper.layers.attention import Attention
from taper.layers.linear import Linear

F32 = npt.NDArray[np.float32]

# Called with a matrix's name and the float32 (tokens, in_features) that it is multiplied with, before
# rotation.
Observer = Callable[[str, F32], None]


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward call shares: first position, tables, bits and who watches."""

    position: int
    cos: F32
    sin: F32
    bits: int
    observe: Observer | None


@dataclass(frozen=True, slots=True)
class Block:
    """The four matrices of layer `name` (`layers.I`) around one attention."""

    name: str
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    attention: Attention

    def __call__(self, x: F32, kv: KvLayer, step: Step, num_wanted: int | None = None) -> F32:
        """The residual stream after this layer, float32 (tokens, hidden); writes keys and values.

        With `num_wanted`, of the last so many tokens only: in the last layer of a prefill the others have to
        leave their keys and values, and nobody asks for the rest.
        """
        bits, observe = step.bits, step.observe
        qkv = self.qkv(x, bits)
        self.attention.store(qkv, kv.keys, kv.values, step.position, step.cos, step.sin)
        skipped = 0 if num_wanted is None else len(x) - num_wanted
        if skipped:
            x, qkv = x[skipped:], qkv[skipped:]
        if num_wanted == 0:
            return x
        mixed = self.attention(qkv, kv.keys, kv.values, step.position + skipped)
        after_attention = self.o(mixed, bits, x)
        gate_up = self.gate_up(after_attention, bits)
        if observe is not None:
            observe(f"{self.name}.qkv", self.qkv.product_input(x))
            observe(f"{self.name}.o", self.o.product_input(mixed))
            observe(f"{self.name}.gate_up", self.gate_up.product_input(after_attention))
            observe(f"{self.name}.down", self.down.product_input(gate_up))
        return self.down(gate_up, bits, after_attention)

    def bytes_read(self, bits: int) -> int:
        """Bytes of weights that one call reads."""
        return sum(linear.bytes_read(bits) for linear in (self.qkv, self.o, self.gate_up, self.down))
