"""How good a width is: perplexity, KL divergence and agreement with the float checkpoint."""

from taper.evaluate.perplexity import (
    PerplexityReport,
    Reader,
    WidthResult,
    measure_blocks,
    measure_perplexity,
)
from taper.evaluate.protocols import PROTOCOLS, Blocks, cut

__all__ = [
    "PROTOCOLS",
    "Blocks",
    "PerplexityReport",
    "Reader",
    "WidthResult",
    "cut",
    "measure_blocks",
    "measure_perplexity",
]
