"""How commands find a capture: by time in the run directory, or by the path of a file."""

from pathlib import Path

from gateway.capture import reading, shelf
from gateway.errors import NotFoundError


def reading_of(
    capture: str,
    model: str,
    *,
    registry: Path,
    state_dir: Path | None = None,
    run_dir: str | None = None,
) -> reading.Reading:
    """The records of a capture.

    Parameters
    ----------
    capture : `last-24h`, `all`, the model's own name for all, a file, or a directory of files
    run_dir : of the server; None: as the settings say

    Raises
    ------
    GatewayError : there is none, or it is no capture.
    """
    path = Path(capture)
    if path.is_file():
        return reading.Reading([path])
    if path.is_dir():
        inside = sorted(path.rglob(f"*{shelf.SUFFIX}"), key=lambda file: (file.name, str(file)))
        if not inside:
            raise NotFoundError(f"{capture}: holds no file of a capture (*{shelf.SUFFIX})")
        return reading.Reading(inside)
    from gateway import config

    settings = config.load({
        "registry": str(registry),
        "state_dir": None if state_dir is None else str(state_dir),
        "run_dir": run_dir,
    })  # fmt: skip
    what = "all" if capture == model else capture
    return reading.find(what, settings.run_path / "captures", model)
