"""A server over a tiny model; skipped where the `server` extra is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for name in ("starlette", "msgspec", "prometheus_client", "httpx", "uvicorn", "llguidance"):
    pytest.importorskip(name, reason="the server needs pip install 'taper[server]'")

sys.path.insert(0, str(Path(__file__).parent))
