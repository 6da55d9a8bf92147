"""driftgate: serves ONNX models, splits their traffic, and notices when they drift."""

import os

__version__ = "0.1.0"

# onnxruntime's Linux wheel reports usage from the moment it is imported: this comes before that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
