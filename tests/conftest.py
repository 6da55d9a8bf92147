"""What every test needs before it starts."""

import os
import signal

from hypothesis import settings

# The gateway says no to onnxruntime's telemetry; that must come before onnxruntime is imported.
import gateway  # noqa: F401

# The same examples on every run of CI; new ones on every run of a person.
settings.register_profile("ci", derandomize=True)
if "CI" in os.environ:
    settings.load_profile("ci")

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
