"""Precision policies: how many bits each forward pass reads."""

from taper.precision.kinds import Exact, Fixed, PhaseAware, Progressive, ProgressiveThirds
from taper.precision.learned import Learned
from taper.precision.parse import describe_widths, parse_policy
from taper.precision.policy import (
    Bits,
    KvEntries,
    LayerBits,
    LogitFeatures,
    Phase,
    PrecisionPolicy,
    StepContext,
    whole_bits,
)

__all__ = [
    "Bits",
    "Exact",
    "Fixed",
    "KvEntries",
    "LayerBits",
    "Learned",
    "LogitFeatures",
    "Phase",
    "PhaseAware",
    "PrecisionPolicy",
    "Progressive",
    "ProgressiveThirds",
    "StepContext",
    "describe_widths",
    "parse_policy",
    "whole_bits",
]
