"""How much one request may ask for. A request is hostile until it is checked."""

from __future__ import annotations

MAX_BODY_BYTES = 8 << 20  # a context of 128 k tokens is 0.5 MB of text
BODY_TIMEOUT_S = 30.0  # a client that sends a byte a minute must not hold a connection
MAX_JSON_DEPTH = 64
MAX_HEADER_BYTES = 16 << 10

MAX_N = 8  # vLLM fell over n = 1,000,000
MAX_PROMPTS = 64  # of one completions request; lm-eval-harness sends batches
MAX_SEQUENCES = 128  # prompts times n
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
GRAMMAR_TIMEOUT_S = 5.0
MAX_CACHED_GRAMMARS = 32

MAX_DEADLINE_MS = 86_400_000.0
