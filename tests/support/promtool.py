"""promtool, Prometheus's own checker of rules and configurations, as far as this machine has it."""

import subprocess
from pathlib import Path

from tests.support.prometheus_server import program


def promtool() -> str:
    """Its path. Without it the test is skipped; in CI, where nobody would notice that, it fails."""
    return program("promtool")


def run(*args: str, directory: Path) -> str:
    """Run promtool in ``directory``; and return what it says; if it has objections, the test fails with them."""
    done = subprocess.run([promtool(), *args], cwd=directory, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
