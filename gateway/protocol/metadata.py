"""What the protocol's metadata and health paths answer."""

from collections.abc import Sequence

from gateway import __version__
from registry.signature import Signature, TensorSpec

PLATFORM = "onnxruntime_onnx"
"""The name that clients of Triton know an ONNX model by."""

EXTENSIONS: tuple[str, ...] = ()
"""Only what works is announced: clients decide by this list."""


def server() -> dict[str, object]:
    """`GET /v2`."""
    return {"name": "driftgate", "version": __version__, "extensions": list(EXTENSIONS)}


def model(name: str, versions: Sequence[int], signature: Signature) -> dict[str, object]:
    """`GET /v2/models/{m}`; free axes are -1."""
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": PLATFORM,
        "inputs": [_tensor(spec) for spec in signature.inputs],
        "outputs": [_tensor(spec) for spec in signature.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
