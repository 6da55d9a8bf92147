"""`driftgate serve`: every setting as a flag, over environment, file and default."""

from pathlib import Path
from typing import Annotated

import typer

from gateway import config
from gateway.place import Place


def serve(  # noqa: PLR0917  typer reads options from the parameters
    registry: Annotated[
        str | None, typer.Argument(help="Registry directory: <model>/<version>/model.onnx.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one.")] = None,
    no_grpc: Annotated[
        bool | None, typer.Option("--no-grpc", help="Do not listen for gRPC.")
    ] = None,
    grpc_carrier: Annotated[
        str | None, typer.Option(help="What carries gRPC: grpcio, or zttp (extra http2).")
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(help="Certificate (PEM); HTTP and gRPC then speak TLS only.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its private key (PEM).")] = None,
    tls_client_ca: Annotated[
        str | None, typer.Option(help="Authorities (PEM) that clients' certificates must be of.")
    ] = None,
    keys: Annotated[
        str | None, typer.Option(help="File of keys: all but health then needs one.")
    ] = None,
    trust: Annotated[
        str | None, typer.Option(help="Public keys: only versions signed by one are served.")
    ] = None,
    state_dir: Annotated[str | None, typer.Option(help="Where adopted profiles are kept.")] = None,
    run_dir: Annotated[
        str | None, typer.Option(help="Where workers keep their counts, on a local disk.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that answer.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Settings in YAML or JSON.")
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure", help="Predictions and monitors need no key, also beyond loopback."
        ),
    ] = None,
    batch_rows_max: Annotated[int | None, typer.Option(help="Rows in one batch at most.")] = None,
    monitor_sample: Annotated[
        float | None, typer.Option(help="Percent of requests that are monitored.")
    ] = None,
    monitor_window_rows: Annotated[int | None, typer.Option(help="Rows in one window.")] = None,
    adopt_rows: Annotated[
        int | None, typer.Option(help="Adopt a reference from the first so many rows.")
    ] = None,
    labels_sample: Annotated[
        float | None, typer.Option(help="Percent of predictions that are kept for labels.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, json or text.")] = None,
) -> None:
    """Serve the models of a registry directory."""
    settings = config.load(
        {
            "registry": registry,
            "host": host,
            "port": port,
            "grpc_port": grpc_port,
            "no_grpc": no_grpc,
            "grpc_carrier": grpc_carrier,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "tls_client_ca": tls_client_ca,
            "keys": keys,
            "trust": trust,
            "run_dir": run_dir,
            "state_dir": state_dir,
            "workers": workers,
            "insecure": insecure,
            "batch.rows_max": batch_rows_max,
            "monitor.sample": monitor_sample,
            "monitor.window_rows": monitor_window_rows,
            "monitor.adopt_rows": adopt_rows,
            "labels.sample": labels_sample,
            "log.format": log_format,
        },
        file=config_file,
    )
    from gateway import supervisor

    def work(settings: config.ServerConfig, place: Place) -> int:
        from gateway import worker  # what a worker imports, the supervisor never holds

        return worker.run(settings, place)

    supervisor.serve(settings, work)
