"""How a KV cache of planes is stored and read: magnitude bits of keys and values, by layer and by age."""

from __future__ import annotations

import re
from dataclasses import dataclass

from taper.errors import UsageError
from taper.formats.activations import KV_FLOAT16

# With the sign a value is an int8 (docs/numerics.md, "KV cache as planes").
MAX_KV_BITS = 7
_HINT = "write float16, or magnitude bits as in 7, k7v5, 7,4@128 or k7v6,k5v4@256"

LayerBitsOf = int | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvPlanes:
    """Magnitude bits of a cache in the Anda format: 1 to 7 each, one number for all layers or one a layer.

    Attributes:
        key_bits, value_bits: of entries, as they are written and as the recent ones are read.
        old_key_bits, old_value_bits: what is read of blocks that lie at least `window` entries back, and all
            that a cache keeps of them; the same as above where there is no window.
        window: entries; None: nothing grows old.

    Raises:
        UsageError: bits outside 1..7, old ones above the recent ones, layers that differ in number, a window
            below 1.
    """

    key_bits: LayerBitsOf
    value_bits: LayerBitsOf
    old_key_bits: LayerBitsOf | None = None
    old_value_bits: LayerBitsOf | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is None and (self.old_key_bits is not None or self.old_value_bits is not None):
            raise UsageError("a KV cache has bits for old entries and no window", _HINT)
        if self.window is not None and self.window < 1:
            raise UsageError(f"the window of a KV cache is {self.window}; it must be at least 1", _HINT)
        named = [self.key_bits, self.value_bits, self.old_key_bits, self.old_value_bits]
        lengths = {len(bits) for bits in named if isinstance(bits, tuple)}
        if len(lengths) > 1:
            raise UsageError(
                f"bits of a KV cache are given for {sorted(lengths)} layers", "give as many each"
            )
        for layer in range(max(lengths, default=1)):
            key, value, old_key, old_value = self.layer(layer)
            for kind, bits, old in (("keys", key, old_key), ("values", value, old_value)):
                if not 1 <= old <= bits <= MAX_KV_BITS:
                    raise UsageError(
                        f"{kind} of a KV cache have {bits} magnitude bits and {old} when they are old; "
                        f"1..{MAX_KV_BITS} are possible, and no more for old ones",
                        _HINT,
                    )

    @property
    def num_layers(self) -> int | None:
        """Layers that bits are given for; None: the same for any."""
        named = [self.key_bits, self.value_bits, self.old_key_bits, self.old_value_bits]
        return next((len(bits) for bits in named if isinstance(bits, tuple)), None)

    def layer(self, index: int) -> tuple[int, int, int, int]:
        """Bits of a layer's keys, values, old keys and old values."""
        key, value = _of_layer(self.key_bits, index), _of_layer(self.value_bits, index)
        old_key = key if self.old_key_bits is None else _of_layer(self.old_key_bits, index)
        old_value = value if self.old_value_bits is None else _of_layer(self.old_value_bits, index)
        return key, value, old_key, old_value

    def __str__(self) -> str:
        recent = _text(self.key_bits, self.value_bits)
        if self.window is None:
            return recent
        old_key = self.key_bits if self.old_key_bits is None else self.old_key_bits
        old_value = self.value_bits if self.old_value_bits is None else self.old_value_bits
        return f"{recent},{_text(old_key, old_value)}@{self.window}"


def parse_kv(text: str) -> KvPlanes | None:
    """Read float16 (None) or magnitude bits.

    `7` is for keys and values, `k7v5` for each; `7,4@128` keeps 4 bits of blocks that lie 128 entries back.

    Raises:
        UsageError: for anything else.
    """
    if text == KV_FLOAT16:
        return None
    bits = r"(?:k([0-9]+)v([0-9]+)|([0-9]+))"
    found = re.fullmatch(rf"{bits}(?:,{bits}@([0-9]{{1,9}}))?", text)
    if not found:
        raise UsageError(f"KV format {text!r} is not understood", _HINT)
    key, value, both, old_key, old_value, old_both, window = found.groups()
    if window is None:
        return KvPlanes(int(key or both), int(value or both))
    return KvPlanes(
        int(key or both),
        int(value or both),
        int(old_key or old_both),
        int(old_value or old_both),
        int(window),
    )


def _of_layer(bits: LayerBitsOf, index: int) -> int:
    return bits[index] if isinstance(bits, tuple) else bits


def _text(key: LayerBitsOf, value: LayerBitsOf) -> str:
    return f"{key}" if key == value else f"k{key}v{value}"
