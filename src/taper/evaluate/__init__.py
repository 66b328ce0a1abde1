"""How good a width is: perplexity, KL divergence and agreement with the float checkpoint."""

from taper.evaluate.perplexity import PerplexityReport, WidthResult, measure_perplexity
from taper.evaluate.protocols import PROTOCOLS

__all__ = ["PROTOCOLS", "PerplexityReport", "WidthResult", "measure_perplexity"]
