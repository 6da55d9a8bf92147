"""Numbers about drift: counts in, scores, evidence and alarms out. No clock, no thread, no I/O."""

from monitors.budget import Budget
from monitors.counts import Counts, MonitorCounts
from monitors.errors import (
    BinMismatchError,
    BlockError,
    MonitorError,
    ProfileError,
    ProfileMismatchError,
)
from monitors.monitor import Monitor
from monitors.profile import Profile
from monitors.window import Alarm, ChannelReport, Report, Score, Window

__all__ = [
    "Alarm",
    "BinMismatchError",
    "BlockError",
    "Budget",
    "ChannelReport",
    "Counts",
    "Monitor",
    "MonitorCounts",
    "MonitorError",
    "Profile",
    "ProfileError",
    "ProfileMismatchError",
    "Report",
    "Score",
    "Window",
]
