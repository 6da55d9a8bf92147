"""Files and names: models, versions, signatures. Knows no HTTP, no ONNX, no monitors."""
