"""What every test needs before it starts."""

import os

from hypothesis import settings

# The gateway says no to onnxruntime's telemetry; that must come before onnxruntime is imported.
import gateway  # noqa: F401

# The same examples on every run of CI; new ones on every run of a person.
settings.register_profile("ci", derandomize=True)
if "CI" in os.environ:
    settings.load_profile("ci")
