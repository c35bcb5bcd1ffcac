"""A clock for tests: it stands still until told to go, and then goes in leaps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class HeldTimer:
    """A clock with alarms, behind `p2pcache.pacing.Timer`.

    Held, alarms go off when the test calls `ring`. Once flowing, the clock leaps to the next alarm
    whenever there is one: time passes only in waits for it, and its reading is the sum of them.
    """

    def __init__(self, *, flowing: bool = False) -> None:
        self.now = 0.0
        self._flowing = flowing
        self._alarms: list[_Alarm] = []

    @property
    def is_set(self) -> bool:
        """Some alarm will go off."""
        return bool(self._alarms)

    def time(self) -> float:
        """What the clock shows."""
        return self.now

    def call_at(self, when: float, callback: Callable[[], Any], /) -> _Alarm:
        """Set an alarm."""
        alarm = _Alarm(self, when, callback)
        self._alarms.append(alarm)
        self._alarms.sort(key=lambda alarm: alarm.when)
        if self._flowing:
            asyncio.get_running_loop().call_soon(self._leap)
        return alarm

    def ring(self, *, early_s: float = 0.0) -> None:
        """Go on to the next alarm, which may go off too early."""
        alarm = self._alarms.pop(0)
        self.now = max(self.now, alarm.when - early_s)
        alarm.callback()

    def flow(self) -> None:
        """From now on never stand still while somebody waits."""
        self._flowing = True
        self._leap()

    def _leap(self) -> None:
        if self._alarms:
            self.ring()

    def drop(self, alarm: _Alarm) -> None:
        """Have it not go off."""
        if alarm in self._alarms:
            self._alarms.remove(alarm)


class _Alarm:
    def __init__(self, timer: HeldTimer, when: float, callback: Callable[[], Any]) -> None:
        self._timer = timer
        self.when = when
        self.callback = callback

    def cancel(self) -> None:
        self._timer.drop(self)
