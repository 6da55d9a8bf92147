"""What the protocol's metadata and health paths answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway import __version__
from registry.signature import Signature, TensorSpec

PLATFORM = "onnxruntime_onnx"
"""The name that clients of Triton know an ONNX model by."""

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
)
"""Only what works is announced: clients decide by this list."""


def server(*, can_admin: bool = True) -> dict[str, object]:
    """`GET /v2`; where nobody may load and unload models, that is not announced."""
    extensions = [name for name in EXTENSIONS if can_admin or name != "model_repository"]
    return {"name": "driftgate", "version": __version__, "extensions": extensions}


def model(name: str, versions: Sequence[int], signature: Signature) -> dict[str, object]:
    """`GET /v2/models/{m}`; free axes are -1."""
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": PLATFORM,
        "inputs": [_tensor(spec) for spec in signature.inputs],
        "outputs": [_tensor(spec) for spec in signature.outputs],
    }


def has_batches(signature: Signature) -> bool:
    """Whether clients of Triton may put a batch axis before the shapes they are told.

    Not where an input is nothing but that axis: load generators stop at a shape without axes.
    """
    return signature.has_row_axis and all(len(spec.shape) > 1 for spec in signature.inputs)


def configuration(
    name: str,
    signature: Signature,
    *,
    rows_max: int,
    batch_rows_max: int | None,
    wait_s_max: float,
) -> dict[str, object]:
    """`GET /v2/models/{m}/config`, in Triton's shape.

    A model that `has_batches` has `max_batch_size` > 0, and its `dims` lack the first axis; any
    other has 0, and whole shapes. Clients conclude from one to the other.

    Parameters
    ----------
    rows_max : rows in one request
    batch_rows_max : rows of several requests in one run; None: they do not share runs
    """
    has_rows = has_batches(signature)
    config: dict[str, object] = {
        "name": name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": rows_max if has_rows else 0,
        "input": [
            _configured(spec, has_rows=has_rows)
            | {"format": "FORMAT_NONE", "allow_ragged_batch": False, "optional": False}
            for spec in signature.inputs
        ],
        "output": [
            _configured(spec, has_rows=has_rows) | {"label_filename": ""}
            for spec in signature.outputs
        ],
        "batch_input": [],
        "batch_output": [],
        "instance_group": [{"name": name, "kind": "KIND_CPU", "count": 1, "gpus": []}],
        "default_model_filename": "model.onnx",
        "parameters": {},
        "model_warmup": [],
        "model_transaction_policy": {"decoupled": False},
        "response_cache": {"enable": False},
    }
    if has_rows and batch_rows_max is not None:
        config["dynamic_batching"] = {
            "preferred_batch_size": [batch_rows_max],
            "max_queue_delay_microseconds": round(wait_s_max * 1e6),
            "preserve_ordering": False,
        }
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What one version has done since the server's start: numbers, and nanoseconds."""

    last_ms: int = 0
    """When it ran last, in milliseconds since 1970; 0: never."""
    rows: int = 0
    runs: int = 0
    ok: tuple[int, int] = (0, 0)
    """Requests, and nanoseconds from their first byte to their answer."""
    failed: tuple[int, int] = (0, 0)
    queued: tuple[int, int] = (0, 0)
    """Requests that left the queue, and what they waited."""
    ran: tuple[int, int] = (0, 0)
    """Requests that ran, and what their runs took; a run that several share counts for each."""


def statistics(name: str, version: int, counts: Counts) -> dict[str, object]:
    """One version in `GET /v2/models/{m}/stats`; load generators read each of these fields.

    Reading and writing of tensors is not timed apart: `compute_input` and `compute_output` have 0
    nanoseconds, and what `success` has beyond `queue` and `compute_infer` is theirs.
    """
    untimed, never = (counts.ran[0], 0), (0, 0)
    durations = {
        "success": counts.ok,
        "fail": counts.failed,
        "queue": counts.queued,
        "compute_input": untimed,
        "compute_infer": counts.ran,
        "compute_output": untimed,
        "cache_hit": never,
        "cache_miss": never,
    }
    return {
        "name": name,
        "version": str(version),
        "last_inference": counts.last_ms,
        "inference_count": counts.rows,
        "execution_count": counts.runs,
        "inference_stats": {
            stage: {"count": count, "ns": ns} for stage, (count, ns) in durations.items()
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }


def _configured(spec: TensorSpec, *, has_rows: bool) -> dict[str, object]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
    dims = spec.shape[1:] if has_rows else spec.shape
    return {
        "name": spec.name,
        "data_type": f"TYPE_{kind}",
        "dims": list(dims),
        "is_shape_tensor": False,
    }


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
