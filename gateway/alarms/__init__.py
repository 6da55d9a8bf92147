"""Alarms as episodes, and what is done about them: an event log, signed webhooks, presets.

`log` keeps episodes (opened, passed, acknowledged, accepted) in a file that is only appended to;
`targets` reads who is told; `presets` writes what each of them understands; `webhooks` tells them,
on a thread of its own. The last three are imported only where somebody is told: httpx takes its
time to load.
"""

from gateway.alarms.log import AlarmLog, Crossing, Episode

__all__ = ["AlarmLog", "Crossing", "Episode"]
