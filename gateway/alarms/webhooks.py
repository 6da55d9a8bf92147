"""Tells targets of alarms, on a thread with a loop of its own: no prediction waits for a receiver.

Each event and target is tried at most five times, with full jitter, over ten minutes. What cannot
be told is written to a file of dead letters. A target that hangs delays no other.
"""

import asyncio
import base64
import fcntl
import hashlib
import hmac
import json
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.alarms.log import AlarmLog, Episode, Event
from gateway.alarms.presets import PRESETS, Body, Message
from gateway.alarms.targets import Secret, Target, Targets
from gateway.counters import Counter
from gateway.outgoing import Allowed, DeliveryError, deliver
from gateway.telemetry import event

TRIES_MAX = 5
WITHIN_S = 600.0
WAITS_S = (20.0, 60.0, 160.0, 360.0)
"""The longest pause before the second, third, ... try; together they are WITHIN_S."""
QUEUE_MAX = 1_000
_DEAD_BYTES_MAX = 16 * 1024 * 1024
_CATCH_UP_S = 3600.0
_AT_A_TIME = 16


@dataclass(slots=True)
class WebhookMeters:
    """What is counted, by the webhooks' thread (`refused`: by whoever hands over)."""

    delivered: Counter
    retried: Counter
    dead: Counter
    refused: Counter


def signed(body: Body, key: str, moment: int, secret: Secret | None) -> dict[str, str]:
    """Headers of a body: id, time, and the signature over both and the body.

    As Standard Webhooks has it, so that its libraries verify it: HMAC-SHA256 over `id.time.body`.
    """
    headers = {**body.headers, "webhook-id": key, "webhook-timestamp": str(moment)}
    headers["idempotency-key"] = key
    if secret is not None:
        said = f"{key}.{moment}.".encode() + body.content
        digest = hmac.digest(secret.reveal().encode(), said, hashlib.sha256)
        headers["webhook-signature"] = "v1," + base64.b64encode(digest).decode()
    return headers


async def attempt(
    target: Target,
    message: Message,
    allowed: Allowed,
    send: Callable[..., Awaitable[int]] = deliver,
) -> int:
    """One try; the status of an answer that says it was taken.

    Raises
    ------
    DeliveryError
    """
    preset = PRESETS[target.preset]
    body = preset.write(message, target.options)
    try:
        secret, token = target.secret(), target.token()
    except (OSError, UnicodeDecodeError):
        raise DeliveryError("its secret_file or token_file cannot be read") from None
    headers = signed(body, message.key, int(time.time()), secret)
    if token is not None:
        headers["authorization"] = f"Bearer {token.reveal()}"
    return await send(target.url, body.content, headers, allowed, done=preset.done)


class Webhooks:
    """The thread, and what waits for it.

    Parameters
    ----------
    chosen : the targets that are told of a model's alarms, by name; None: all that want to be
    sleep, jitter : time and chance, so that tests need neither
    """

    def __init__(
        self,
        targets: Targets,
        log: AlarmLog,
        dead_letters: Path,
        meters: WebhookMeters,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[float], float] = lambda high: random.uniform(0, high),  # noqa: S311
        send: Callable[..., Awaitable[int]] = deliver,
        chosen: Callable[[str], Sequence[str] | None] = lambda _: None,
    ) -> None:
        self._targets = targets
        self._chosen = chosen
        self._link = targets.link
        self._allowed = targets.allowed
        self._log = log
        self._dead_letters = dead_letters
        self._meters = meters
        self._sleep, self._jitter, self._send = sleep, jitter, send
        self._waiting = 0
        self._lock: int | None = None
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._thread = threading.Thread(target=self._work, name="webhooks", daemon=True)
        log.listeners.append(self.happened)

    @property
    def waiting(self) -> int:
        """Deliveries under way or between tries."""
        return self._waiting

    def start(self) -> None:
        """Start the thread; what was opened lately and not told is told now, by one worker."""
        self._thread.start()
        if not self._is_first():
            return
        since = time.time() - _CATCH_UP_S
        for episode in self._log.episodes():
            if episode.opened >= since and episode.state == "open":
                for target in self._targets.targets:
                    if target.name not in episode.delivered:
                        self._tell(
                            target,
                            Message("opened", episode.opened, episode, self._source, self._link),
                        )

    def stop(self) -> None:
        """End. What was not told yet is told after the next start, if that is soon."""
        if not self._thread.is_alive():
            self._loop.close()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(6)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _is_first(self) -> bool:
        """Whether no other process has taken up what was left; the lock ends with this one."""
        try:
            self._dead_letters.parent.mkdir(parents=True, exist_ok=True)
            lock = self._dead_letters.with_name("alarms.webhooks.lock")
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    @property
    def _source(self) -> str:
        return self._targets.name

    def happened(self, happened: Event, episode: Episode) -> None:
        """An event of the log, told to whoever wants to know. Never waits."""
        for target in self._targets.targets:
            if target.wants(happened.event, episode.model, episode.about):
                self._tell(
                    target,
                    Message(happened.event, happened.time, episode, self._source, self._link),
                )

    def _tell(self, target: Target, message: Message) -> None:
        chosen = self._chosen(message.episode.model)
        if chosen is not None and target.name not in chosen:
            return
        if not target.wants(message.kind, message.episode.model, message.episode.about):
            return
        if self._waiting >= QUEUE_MAX or not self._thread.is_alive():
            self._meters.refused.add()
            event("alarm_not_told", logging.ERROR, alarm=message.key, target=target.name)
            return
        self._waiting += 1
        self._loop.call_soon_threadsafe(self._begin, target, message)

    # -- the thread

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    def _begin(self, target: Target, message: Message) -> None:
        task = self._loop.create_task(self._deliver(target, message))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._waiting -= 1

    async def _deliver(self, target: Target, message: Message) -> None:
        left_s, reason = WITHIN_S, ""
        for k in range(TRIES_MAX):
            try:
                async with self._turns:
                    await attempt(target, message, self._allowed, self._send)
            except DeliveryError as error:
                reason = str(error)
                if error.is_final or k == TRIES_MAX - 1:
                    break
                pause_s = max(self._jitter(WAITS_S[k]), error.retry_after_s or 0.0)
                if pause_s > left_s:
                    break
                left_s -= pause_s
                self._meters.retried.add()
                await self._sleep(pause_s)
                continue
            except Exception as error:  # noqa: BLE001  one bad message must not end the thread
                reason = f"could not be written: {type(error).__name__}"
                break
            self._meters.delivered.add()
            event("alarm_told", alarm=message.key, target=target.name, tries=k + 1)
            if message.kind == "opened":
                await asyncio.to_thread(
                    self._log.told, message.episode.id, target.name, is_dead=False
                )
            return
        self._meters.dead.add()
        event("alarm_dead", logging.ERROR, alarm=message.key, target=target.name, reason=reason)
        await asyncio.to_thread(self._bury, target, message, reason)

    def _bury(self, target: Target, message: Message, reason: str) -> None:
        if message.kind == "opened":
            self._log.told(message.episode.id, target.name, is_dead=True, reason=reason)
        line = json.dumps({
            "format": 1, "time": time.time(), "target": target.name, "reason": reason,
            "key": message.key, "kind": message.kind, "alarm": message.data,
        }, default=str)  # fmt: skip
        try:
            self._dead_letters.parent.mkdir(parents=True, exist_ok=True)
            with self._dead_letters.open("a", encoding="utf-8") as file:
                if file.tell() < _DEAD_BYTES_MAX:
                    file.write(line + "\n")
        except OSError as error:
            event("dead_letter_not_kept", logging.ERROR, reason=error.strerror)
