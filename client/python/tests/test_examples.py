"""The examples run to their end against the real server, the generic reflection-driven client among them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output(example: str, endpoint: str) -> str:
    """What an example prints. It must succeed."""
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / example), endpoint], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_generic_client_finds_and_uses_the_services_by_reflection(endpoint: str) -> None:
    said = output("reflection.py", endpoint)
    for service in ("Adapter", "Context", "Generation", "Model", "Session"):
        assert f"imprint.v1.{service}Service" in said
    assert "grpc.health.v1.Health" in said
    assert "Ingest(stream IngestRequest) returns (stream IngestResponse)" in said
    assert "'applied': {'seq': '1', 'adapter_version': '1'" in said
    assert "'finished'" in said


def test_the_transcript_tells_the_whole_exchange(endpoint: str) -> None:
    said = output("transcript.py", endpoint)
    assert "adapter_version=1" in said
    assert "NOT_FOUND" in said.rsplit(">>>", 1)[1]
