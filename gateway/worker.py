"""One worker process: one event loop with its listeners."""

import sys
from pathlib import Path

from gateway import __version__
from gateway.app import App
from gateway.config import ServerConfig
from gateway.listener import Listener, bind
from gateway.prediction import DataPlane
from gateway.sync import look
from gateway.telemetry import event, start_logging


def serve(config: ServerConfig) -> None:
    """Serve until told to end.

    Raises
    ------
    StartError : the registry or the port says no; nothing was started.
    """
    start_logging(config.log.format, config.log.level)
    look(Path(config.registry))
    listening = bind(config.host, config.port)
    port = listening.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host

    def say_ready(plane: DataPlane) -> None:
        models = plane.table.models.values()
        open_models = [model for model in models if model.champion is not None]
        event(
            "ready" if open_models else "no_model_opened",
            release=__version__,
            url=f"http://{host}:{port}",
            models=len(open_models),
            refused=sum(len(model.refused) for model in models),
        )

    listener = Listener(App(config, say_ready), config)
    listener.run(sockets=[listening])
    if not listener.started:
        sys.exit(3)
    event("stopped")
