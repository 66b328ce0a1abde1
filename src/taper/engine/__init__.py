"""The engine: requests, sequences, sampling, streaming."""

from taper.engine.audit import Audit, Decisions
from taper.engine.completion import Completion, StepOutput, Usage
from taper.engine.engine import Engine, TokenStream
from taper.engine.llm import LLM, embedded_model, load
from taper.engine.memory import peak_memory_bytes
from taper.engine.request import Request
from taper.engine.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "Audit",
    "Completion",
    "Decisions",
    "Engine",
    "Request",
    "SamplingParams",
    "StepOutput",
    "TokenStream",
    "Usage",
    "embedded_model",
    "load",
    "peak_memory_bytes",
]
