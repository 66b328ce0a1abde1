"""A server on a free port in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time

from taper.server.app import make_app
from taper.server.guard import LOOPBACK_HOSTS
from taper.server.start import DrainingServer, ServeOptions, listen


@contextlib.contextmanager
def running(models, key=None):
    """Serve the models; the URL."""
    with listen(ServeOptions(port=0)) as bound:
        app = make_app(models, hosts=LOOPBACK_HOSTS, key=key)
        server = DrainingServer(app, grace_s=2)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)
