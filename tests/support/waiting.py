"""How a test waits for what another thread or process does."""

import time


def wait_for(condition, timeout=60):
    """Return as soon as ``condition()`` holds; fail if it does not within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
