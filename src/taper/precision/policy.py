"""The one question a precision policy answers: how many bits for the next forward pass of this sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Phase = Literal["prefill", "decode"]
KvEntries = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class LogitFeatures:
    """What the model's last distribution says about its certainty.

    Attributes:
        entropy: of the raw distribution, in nats.
        margin: probability of the best token minus that of the second best.
        max_probability: probability of the best token.
    """

    entropy: float
    margin: float
    max_probability: float


@dataclass(frozen=True, slots=True)
class StepContext:
    """What is known just before a forward pass.

    The token with index n (from 0) is drawn from the logits of the pass that runs with `num_generated == n`:
    the last prefill chunk for n = 0, then the decode pass that reads token n - 1. So the bits given for a
    step are the bits of the token that comes out of it.

    Attributes:
        phase: prefill (a chunk of the prompt) or decode (one generated token).
        position: of the first token of this pass in the sequence.
        num_generated: tokens drawn so far; 0 in prefill, at least 1 in decode.
        max_tokens: limit on the generated tokens of this request.
        min_bits, max_bits: widths that the model can be read at.
        allows_fractions: whether it can be read at a fraction of bits, too.
        kv: copies the last layer's keys (after RoPE) and values so far when called, float32 (kv_heads,
            position, head_dim); None in prefill.
        logit_features: computes the features of the last logits when called; None in prefill.
    """

    phase: Phase
    position: int
    num_generated: int
    max_tokens: int
    min_bits: int
    max_bits: int
    logit_features: Callable[[], LogitFeatures] | None = None
    allows_fractions: bool = False
    kv: Callable[[], KvEntries] | None = None


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Bits of one pass, layer by layer (DP-LLM, arXiv 2508.06041, section 3: each layer at each step).

    The matrices of a layer get the planes that they have when the whole model is read at its bits, so a
    fraction is spent within the layer as it would be in the model.

    Attributes:
        layers: bits of layer 0, layer 1, ...
        head: bits of the head, and of an embedding that is not the head where bits are counted.
    """

    layers: tuple[float, ...]
    head: float

    def __str__(self) -> str:
        """`4 4 3 3 | 4`: the layers, then the head."""
        return " ".join(f"{bits:g}" for bits in self.layers) + f" | {self.head:g}"


# What a pass may be read at.
Bits = float | LayerBits


@runtime_checkable
class PrecisionPolicy(Protocol):
    """Chooses the bits of every forward pass. A policy that keeps state serves one request only."""

    @property
    def name(self) -> str:
        """The policy as text, for the record of a run."""
        ...

    def bits(self, step: StepContext) -> Bits:
        """Bits for this pass, `step.min_bits`..`step.max_bits`; the engine refuses anything else.

        A fraction is a budget in bits per weight, for models that hold the sensitivity to spend it by
        (`step.allows_fractions`). `LayerBits` gives each of the model's layers bits of its own.
        """
        ...


def whole_bits(bits: float) -> float:
    """An int where the bits are a whole number, so that records say 3 and not 3.0."""
    return int(bits) if bits == int(bits) else float(bits)
