"""How many bits activations and the KV cache have, as a file chooses them (docs/format.md, `activations`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Inputs of a layer's matrices, in the order of Anda's tuples (qkv, o, up and gate, down).
TENSOR_TYPES = ("qkv", "o", "gate_up", "down")
# Magnitude bits of a row of activations: what two int8 parts hold (docs/numerics.md, "Activations").
MAX_ACTIVATION_BITS = 15
KV_FLOAT16 = "float16"
MAX_WIDTH = 8
_MAX_KV_TEXT = 64


@dataclass(frozen=True, slots=True)
class ActivationBits:
    """The choice of a file.

    Attributes:
        bits: tensor type to the magnitude bits of its rows at every width, of all layers or of each; a type
            that is missing has those of the codebook.
        kv: format of the KV cache, as `taper.kvcache.parse_kv` reads it.
        evidence: how they were found: text, losses, bounds, date.
    """

    bits: dict[str, int | list[int]] = field(default_factory=dict)
    kv: str = KV_FLOAT16
    evidence: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], num_layers: int) -> ActivationBits:
        """Read the metadata of a model with so many layers.

        Raises:
            TypeError, ValueError: an entry of another type or outside its range.
        """
        bits, kv, evidence = raw.get("bits", {}), raw.get("kv", KV_FLOAT16), raw.get("evidence", {})
        if not isinstance(bits, dict) or not isinstance(evidence, dict):
            raise TypeError("activations bits and evidence must be objects")
        for name, magnitude in bits.items():
            if name not in TENSOR_TYPES:
                raise ValueError(f"activations name {name!r}, which is none of {', '.join(TENSOR_TYPES)}")
            layers = magnitude if isinstance(magnitude, list) else [magnitude]
            if layers is magnitude and len(layers) != num_layers:
                raise ValueError(f"activations of {name} have bits for {len(layers)} of {num_layers} layers")
            for bits_of_layer in layers:
                if type(bits_of_layer) is not int or not 1 <= bits_of_layer <= MAX_ACTIVATION_BITS:
                    raise ValueError(
                        f"activations of {name} have {bits_of_layer!r} bits, "
                        f"expected 1..{MAX_ACTIVATION_BITS}"
                    )
        if not isinstance(kv, str) or len(kv) > _MAX_KV_TEXT:
            raise ValueError(f"activations kv is no text of at most {_MAX_KV_TEXT} characters")
        return cls(dict(bits), kv, dict(evidence))

    def to_dict(self) -> dict[str, Any]:
        """As in the `activations` metadata; empty for a file that chooses nothing."""
        found: dict[str, Any] = {}
        if self.bits:
            found["bits"] = {name: self.bits[name] for name in TENSOR_TYPES if name in self.bits}
        if self.kv != KV_FLOAT16:
            found["kv"] = self.kv
        if self.evidence:
            found["evidence"] = self.evidence
        return found

    def of_matrix(self, name: str, by_width: Mapping[int, int]) -> Mapping[int, int]:
        """Width to magnitude bits of a matrix's inputs.

        Args:
            name: of the matrix, such as `layers.3.qkv`; head and embedding have those of the codebook.
            by_width: those of the codebook.
        """
        _, _, layer_and_type = name.partition("layers.")
        layer, _, tensor_type = layer_and_type.partition(".")
        chosen = self.bits.get(tensor_type) if layer_and_type else None
        if isinstance(chosen, list):
            chosen = chosen[int(layer)]
        return by_width if chosen is None else dict.fromkeys(range(1, MAX_WIDTH + 1), chosen)
