"""A server over a tiny model; skipped where the `server` extra is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for name in ("starlette", "msgspec", "prometheus_client", "httpx", "uvicorn", "llguidance"):
    pytest.importorskip(name, reason="the server needs pip install 'taper[server]'")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(client, fake loop) of a tiny model with a chat template and a quality card."""
    from fake_loop import FakeLoop
    from starlette.testclient import TestClient

    from taper import load
    from taper.server.app import make_app
    from taper.server.guard import LOOPBACK_HOSTS
    from taper.server.serving import Served
    from taper.testing.tiny import tiny_taper

    llm = load(
        tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", chat=True, max_position_embeddings=1024)
    )
    llm.card = {"widths": [{"bits": b, "increase_frac": 0.5 / b**2} for b in range(2, 9)]}
    loop = FakeLoop(llm.engine)
    app = make_app({"tiny": Served("tiny", llm, loop)}, hosts=LOOPBACK_HOSTS)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=True) as client:
        yield client, loop
