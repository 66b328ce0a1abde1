"""Models on a local Ray cluster."""

from __future__ import annotations

import threading
import time

import pytest


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The URL of two models, the embedded one with two replicas, on a cluster that ends with the tests."""
    import ray

    from taper.engine import embedded_model
    from taper.ray.start import Scale, deployed
    from taper.server.app import app_of
    from taper.server.guard import LOOPBACK_HOSTS
    from taper.server.start import DrainingServer, ServeOptions, listen
    from taper.testing.tiny import tiny_taper

    tiny = tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", chat=True, max_position_embeddings=1024)
    files = {"stories": embedded_model(), "tiny": tiny}
    options = ServeOptions(port=0)
    # Four of Ray's CPUs whatever there are: they are a count of places, the replicas share the real ones.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with listen(options) as bound, deployed(files, options, Scale(2, 2, threads=1)) as front:
            server = DrainingServer(app_of(front, hosts=LOOPBACK_HOSTS), grace_s=2)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
            thread.start()
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
            server.should_exit = True
            thread.join(timeout=10)
    finally:
        ray.shutdown()
