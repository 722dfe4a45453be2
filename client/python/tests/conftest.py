"""The server that the tests speak to.

IMPRINT_ENDPOINT names a running one; otherwise IMPRINT_BIN is started on a free loopback port, with its
default model and generator, and stopped at the end.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from imprint import Client, Session

READY = re.compile(r"127\.0\.0\.1:(\d+)")


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Where the server listens."""
    running = os.environ.get("IMPRINT_ENDPOINT")
    if running:
        yield running
        return
    binary = os.environ.get("IMPRINT_BIN")
    if not binary:
        pytest.fail("set IMPRINT_BIN to the program `imprint`, or IMPRINT_ENDPOINT to a running server")
    with subprocess.Popen([binary, "serve", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                found = READY.search(line)
                if found:
                    yield f"127.0.0.1:{found.group(1)}"
                    break
            else:
                pytest.fail("the server ended before it was ready")
        finally:
            server.send_signal(signal.SIGTERM)
            server.stdout.close()
            assert server.wait(timeout=60) == 0, "the server did not end cleanly"


@pytest.fixture
def client(endpoint: str) -> Iterator[Client]:
    """A blocking client."""
    with Client(endpoint, timeout_s=120) as client:
        yield client


@pytest.fixture
def session(client: Client) -> Iterator[Session]:
    """An empty session that ends with the test."""
    session = client.sessions.create()
    yield session
    client.sessions.delete(session.session_id)
