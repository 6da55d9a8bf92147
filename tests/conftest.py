"""What every test needs before it starts."""

# The gateway says no to onnxruntime's telemetry; that must come before onnxruntime is imported.
import gateway  # noqa: F401
