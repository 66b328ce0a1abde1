"""One transformer layer: attention and the gated feed-forward network, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from taper.layers.attention import Attention, CacheLayer
from taper.layers.linear import Linear

F32 = npt.NDArray[np.float32]

# Called with a matrix's name and the float32 (tokens, in_features) that it is multiplied with, before
# rotation.
Observer = Callable[[str, F32], None]


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward call shares: first position, tables, bits and who watches.

    `widths` are the planes read of each matrix by name; a matrix that is not in it is read at `bits`.
    """

    position: int
    cos: F32
    sin: F32
    bits: float
    observe: Observer | None
    widths: Mapping[str, int] = field(default_factory=dict)

    def width(self, name: str) -> int:
        """Planes to read of a matrix."""
        return self.widths.get(name) or int(self.bits)


@dataclass(frozen=True, slots=True)
class Block:
    """The four matrices of layer `name` (`layers.I`) around one attention."""

    name: str
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    attention: Attention

    def __call__(self, x: F32, kv: CacheLayer, step: Step, num_wanted: int | None = None) -> F32:
        """The residual stream after this layer, float32 (tokens, hidden); writes keys and values.

        With `num_wanted`, of the last so many tokens only: in the last layer of a prefill the others have to
        leave their keys and values, and nobody asks for the rest.
        """
        name, observe = self.name, step.observe
        qkv = self.qkv(x, step.width(f"{name}.qkv"))
        self.attention.store(qkv, kv, step.position, step.cos, step.sin)
        skipped = 0 if num_wanted is None else len(x) - num_wanted
        if skipped:
            x, qkv = x[skipped:], qkv[skipped:]
        if num_wanted == 0:
            return x
        mixed = self.attention(qkv, kv, step.position + skipped)
        after_attention = self.o(mixed, step.width(f"{name}.o"), x)
        gate_up = self.gate_up(after_attention, step.width(f"{name}.gate_up"))
        if observe is not None:
            observe(f"{name}.qkv", self.qkv.product_input(x))
            observe(f"{name}.o", self.o.product_input(mixed))
            observe(f"{name}.gate_up", self.gate_up.product_input(after_attention))
            observe(f"{name}.down", self.down.product_input(gate_up))
        return self.down(gate_up, step.width(f"{name}.down"), after_attention)

    def bytes_read(self, widths: Mapping[str, int]) -> int:
        """Bytes of weights that one call reads at these widths of its matrices."""
        matrices = {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}
        return sum(linear.bytes_read(widths[f"{self.name}.{part}"]) for part, linear in matrices.items())
