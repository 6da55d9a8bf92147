"""Shadows: versions that get copies of requests and answer nobody, compared with who did.

`copier` runs copies on a thread of its own and compares them, with a bound in number, bytes and
time; `pacer` says when to leave the cores to those who answer; `tally` are the counts, which add up
over workers; `report` what they say. This file keeps a worker's shadows in line with its table.

A shadow runs in the process that serves, on the memory of the session that is open anyway. So it
costs no answer anything but CPU, with one exception: native code that crashes takes its worker with
it, once. Such a shadow is barred on all workers until it is started again.
"""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.columns import Column
from gateway.exposures import Slot
from gateway.labels import PredictionLog
from gateway.router import Decision, Meters, Model, Table, Variant
from gateway.shadow import tally
from gateway.shadow.copier import Copier, Drawn, Given
from gateway.shadow.pacer import Pacer, Turns
from gateway.shadow.tally import Pairing, Places
from gateway.telemetry import Telemetry, event
from gateway.tensors import BFLOAT16, Array, n_bytes, widened
from monitors import Profile
from monitors.guards.bets import CANDIDATE
from registry.routes import UNIT_REQUEST

LOOK_S = 0.2
IDLE_LOOK_S = 2.0
"""While there is nothing to copy."""
"""How often the table, and runs under way, are looked at."""
_WRITE_S = 1.0
_JOIN_S_MAX = 2.0
_CHANNELS_MAX = 64
"""Inputs whose bins are counted."""
_BARRED = "barred.json"

Reference = Callable[[str, int], tuple[Sequence[Column], Profile] | None]
"""The reference profile that a version is judged by, and where its channels' values are."""
Crashed = Callable[[int], str]
"""How a process died, if that was a crash of native code; else empty."""


class Copies:
    """What the hot path knows of a model's shadows."""

    __slots__ = ("_is_kept", "_loop", "champion", "copiers")

    def __init__(
        self, champion: Variant, copiers: Sequence[Copier], predictions: PredictionLog | None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_kept = predictions is not None
        self.champion = champion.version
        self.copiers = tuple(copiers)

    def offer(
        self,
        variant: Variant,
        decision: Decision,
        request_id: bytes,
        inputs: list[Array],
        outputs: list[Array],
        rows: int,
    ) -> None:
        """Take copies of a request, once its answer has gone out. Never fails, never waits.

        Only what the champion answers by rule, split or default: pairs are of two versions, and
        calls by number or after a failure are drawn by nobody.

        Parameters
        ----------
        inputs, outputs : in the champion's order
        """
        if variant.version == self.champion and decision.choice.traffic == "primary":
            id_ = request_id.decode("latin-1") if self._is_kept else ""
            self._loop.call_soon(self._offer, decision, Given(id_, inputs, outputs, rows))

    def _offer(self, decision: Decision, given: Given) -> None:
        is_sticky = decision.unit_kind not in ("", UNIT_REQUEST)
        drawn = Drawn(decision.unit or b"", is_sticky)
        size = n_bytes(given.inputs) + n_bytes(given.outputs)
        for copier in self.copiers:
            try:
                copier.offer(drawn, given, size)
            except Exception:  # noqa: BLE001  no copy is worth an answer
                event("shadow_failed", logging.ERROR, model=copier.pairing.model, exc=True)


class Shadows:
    """All shadows of a worker, kept in line with its table. For the loop's thread."""

    def __init__(
        self,
        state_dir: Path,
        run_dir: Path,
        worker: str,
        *,
        telemetry: Telemetry,
        reference: Reference,
        rows_max: int,
        sample: float,
        crashed: Crashed = lambda _: "",
        predictions: PredictionLog | None = None,
    ) -> None:
        """Nothing is read or started before there is a shadow.

        Parameters
        ----------
        worker : host and slot, as in the names of its files
        rows_max : rows in one run
        sample : 0 to 1, of rows that go to the monitors
        """
        self._state_dir, self._run_dir, self._worker = state_dir, run_dir, worker
        self._telemetry, self._reference, self._rows_max = telemetry, reference, rows_max
        self._sample, self._crashed, self._predictions = sample, crashed, predictions
        self.by_model: dict[str, Copies] = {}
        """The same object always: the hot path looks here."""
        self._seen: Table | None = None
        self._meters: dict[tuple[str, int, str], Meters] = {}
        self._leaving: list[Copier] = []
        self._stirred = asyncio.Event()
        self._turns: Turns | None = None
        self._pacer: Pacer | None = None

    async def run(self, table: Callable[[], Table]) -> None:
        """Follow the table, look after runs, write counts down; until cancelled."""
        due = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                is_idle = not (self.by_model or self._leaving)
                async with asyncio.timeout(IDLE_LOOK_S if is_idle else LOOK_S):
                    await self._stirred.wait()
            self._stirred.clear()
            try:
                self.follow(table())
                moment = time.monotonic()
                for copier in self._copiers():
                    copier.tick(moment)
                if moment >= due and (self.by_model or self._leaving):
                    due = moment + _WRITE_S
                    await asyncio.to_thread(self._write)
            except Exception:  # noqa: BLE001  one bad look must not end all looking
                event("shadows_failed", logging.ERROR, exc=True)

    def stir(self) -> None:
        """Look now: the table has become another one."""
        self._stirred.set()

    def follow(self, table: Table) -> None:
        """Start what is new in the table, let go what has left."""
        if table is self._seen:
            return
        self._seen = table
        found: dict[str, Copies] = {}
        for name, model in table.models.items():
            if model.routing is None or not model.routing.route.shadow or model.champion is None:
                continue
            known = {c.pairing.to: c for c in getattr(self.by_model.get(name), "copiers", ())}
            copiers = [
                copier
                for pairing in self._pairings(model, model.champion)
                if (copier := self._copier(model, pairing, known)) is not None
            ]
            if copiers:
                found[name] = Copies(model.champion, copiers, self._predictions)
        before = {id(copier): copier for copier in self._copiers()}
        self.by_model.clear()
        self.by_model.update(found)
        for key in {id(copier) for copier in self._copiers()}:
            before.pop(key, None)
        for copier in before.values():
            copier.close()
            self._leaving.append(copier)

    async def close(self) -> None:
        """End all threads, and write down what they counted."""
        leaving = [*self._copiers(), *self._leaving]
        self._leaving = []
        self.by_model.clear()
        for copier in leaving:
            copier.close()
        await asyncio.to_thread(_end, leaving)
        if self._turns is not None:
            self._turns.close()

    def _pacer_here(self) -> Pacer:
        """One for all shadows: they share what the loop's thread may wait."""
        if self._pacer is None:
            self._turns = Turns(threading.get_native_id())
            self._pacer = Pacer(self._turns)
        return self._pacer

    def _copiers(self) -> list[Copier]:
        return [copier for copies in self.by_model.values() for copier in copies.copiers]

    def _pairings(self, model: Model, champion: Variant) -> list[Pairing]:
        routing = model.routing
        assert routing is not None  # noqa: S101  asked by follow
        # Two names of one version, compared alike, are one shadow: the first counts.
        found: dict[str, Pairing] = {}
        for shadow in routing.route.shadow:
            version = routing.version_of(shadow.to)
            pairing = Pairing(model.name, str(shadow.to), version, champion.version, shadow)
            found.setdefault(pairing.key, pairing)
        return list(found.values())

    def _copier(self, model: Model, pairing: Pairing, known: Mapping[str, Copier]) -> Copier | None:
        """The one that runs already, if it is the same; else a new one; None while it is closed."""
        champion, routing = model.champion, model.routing
        variant = model.variants.get(pairing.version)
        if champion is None or routing is None or variant is None or variant is champion:
            return None
        salt = bytes.fromhex(routing.state.salts.get("shadow", "00" * 16))
        before = known.get(pairing.to)
        if (
            before is not None
            and before.pairing == pairing
            and before.salt == salt
            and before.champion is champion
            and before.shadow is variant
        ):
            return before
        directory = tally.directory(self._state_dir, pairing.model, pairing.key)
        slot = self._run_dir / "in_hand" / (f"shadow.{pairing.model}.{pairing.key}.{self._worker}")
        died = self._died(slot)
        copier = Copier(
            pairing,
            champion,
            variant,
            salt=salt,
            rows_max=self._rows_max,
            file=directory / f"{self._worker}.json",
            slot=slot,
            telemetry=self._telemetry,
            meters=self._meters_of(pairing),
            observe=lambda: random.random() < self._sample,  # noqa: S311  no secret
            places=partial(places_of, self._reference, pairing),
            pacer=self._pacer_here(),
            predictions=self._predictions,
            before=before,
        )
        if died:
            copier.bar(
                f"a worker died by {died} while it ran this shadow; it is not run again until it is"
                " stopped and started again (driftgate shadow)"
            )
            data = msgspec.json.encode({"salt": salt.hex(), "reason": copier.kept.barred})
            tally.write(directory / _BARRED, data)
        elif why := _barred(copier):
            copier.bar(why)
        return copier

    def _died(self, slot: Path) -> str:
        """The signal by which a worker of this slot has died over a run of a shadow."""
        found = Slot.read(slot)
        if found is None:
            return ""
        slot.unlink(missing_ok=True)
        return self._crashed(found.pid) if found.running[CANDIDATE] > 0 else ""

    def _meters_of(self, pairing: Pairing) -> Meters:
        key = (pairing.model, pairing.version, pairing.to)
        if (meters := self._meters.get(key)) is None:
            meters = self._meters[key] = Meters(
                self._telemetry, pairing.model, pairing.version, pairing.to, "shadow"
            )
        return meters

    # -- on the thread that writes

    def _write(self) -> None:
        for copier in self._copiers():
            copier.write()
            if not copier.kept.barred and (why := _barred(copier)):
                copier.bar(why)
        leaving, self._leaving = self._leaving, []
        _end(leaving)


def _end(copiers: Sequence[Copier]) -> None:
    until = time.monotonic() + _JOIN_S_MAX
    for copier in copiers:
        copier.join(max(until - time.monotonic(), 0.0))
        if not copier.is_followed:
            copier.flush()


def _barred(copier: Copier) -> str:
    """Why some worker has barred this shadow, if one has since it was started."""
    try:
        found = msgspec.json.decode((copier.file.parent / _BARRED).read_bytes())
        return str(found["reason"]) if found["salt"] == copier.salt.hex() else ""
    except (OSError, KeyError, TypeError, msgspec.DecodeError):
        return ""


def places_of(reference: Reference, pairing: Pairing) -> Places | None:
    """Rows by bin of the champion's reference profile; None while it has none."""
    found = reference(pairing.model, pairing.against)
    if found is None:
        return None
    columns, profile = found
    inputs = [column for column in columns if not column.is_output][:_CHANNELS_MAX]
    channels = {
        column.channel: profile.channels[column.channel]
        for column in inputs
        if column.channel in profile.channels
    }

    def place(tensors: Sequence[Array], rows: int) -> dict[str, npt.NDArray[np.intp]]:
        placed = {}
        for column in inputs:
            channel = channels.get(column.channel)
            tensor = tensors[column.tensor]
            if channel is None or tensor.shape[:1] != (rows,) or not rows:
                continue
            values = (widened(tensor) if tensor.dtype == BFLOAT16 else tensor).reshape(rows, -1)
            if column.position < values.shape[1]:
                placed[column.channel] = channel.place(
                    np.ascontiguousarray(values[:, column.position])
                )
        return placed

    return Places(profile.digest, {name: channel.bins for name, channel in channels.items()}, place)


__all__ = ["Copies", "Reference", "Shadows"]
