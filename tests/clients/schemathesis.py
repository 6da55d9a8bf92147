"""Schemathesis reads our own OpenAPI document and asks every path for what it promises there."""

import subprocess
import tempfile
from pathlib import Path

from tests.serving import Server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
EXAMPLES = 20
NOT_ASKED = "^/v2/repository/models/|/infer_stream$"
"""Loading and unloading take the models away from all other paths, and a stream of MessagePack
documents is nothing that schemathesis can write. Both have tests of their own."""
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 501]
"""
"""501 is a promise of the document: a verb of another server that is not there."""
RUN_S_MAX = 200


def run(environment: Path, server: Server) -> int:
    """Bounded and seeded examples against every path; its own exit code."""
    program = environment / "bin" / "schemathesis"
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
        return subprocess.run(
            [
                program, "run", f"{server.url}/openapi.json",
                "--checks", ",".join(CHECKS), "--max-examples", str(EXAMPLES), "--seed", "7",
                "--phases", "examples,coverage,fuzzing", "--max-response-time", "5",
                "--exclude-path-regex", NOT_ASKED, "--suppress-health-check", "all",
                "--continue-on-failure", "--no-color",
            ],
            cwd=directory,
            timeout=RUN_S_MAX,
            check=False,
        ).returncode  # fmt: skip
