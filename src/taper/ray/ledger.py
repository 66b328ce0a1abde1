"""What is under way where: which replica ends a new request first, and how tight its deadlines are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

UNROUTED_S = 10.0  # a choice that no replica has taken by then is forgotten: its client has gone
SUSPECT_S = 10.0  # how long a replica that has kept silent is the last choice; by then Serve has replaced it
RECENT_S = 15.0  # how long a missed deadline speaks for more replicas
MAX_PRESSURE = 10.0
# Calls given up because their replica kept silent, from the front's thread to the routers' in one process.
SILENT_CALLS: set[str] = set()


@dataclass(frozen=True, slots=True)
class Asked:
    """What routing and scaling know of a request.

    Attributes:
        deadline_s: on this process's monotonic clock; infinite without one.
        priority: larger is served first.
        tokens: most that it may generate, over all its choices.
        call: of the try at a replica; empty where nobody will ask about it.
    """

    deadline_s: float = inf
    priority: int = 0
    tokens: int = 1
    call: str = ""

    def goes_before(self, other: Asked) -> bool:
        """Whether an engine that looks at deadlines serves this one first, or no later."""
        return (-self.priority, self.deadline_s) <= (-other.priority, other.deadline_s)


@dataclass(frozen=True, slots=True)
class _Entry:
    replica: str
    asked: Asked
    unrouted_since_s: float | None


class Ledger:
    """The requests of one model on its replicas, as its router has sent them. Used by one thread."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._suspected_until_s: dict[str, float] = {}

    def choose(self, request: str, replica: str, asked: Asked, now_s: float) -> None:
        """Note a choice at once: what arrives before the replica has taken the request must see it."""
        self._entries[request] = _Entry(replica, asked, now_s)

    def route(self, request: str, replica: str, asked: Asked) -> None:
        """The replica has taken the request."""
        self._entries[request] = _Entry(replica, asked, None)

    def complete(self, request: str) -> None:
        """The request has ended, in whatever way."""
        entry = self._entries.pop(request, None)
        if entry is not None and entry.asked.call in SILENT_CALLS:
            self._suspect(entry, time.monotonic())

    def keep(self, replicas: Iterable[str], now_s: float) -> None:
        """Forget other replicas, and choices that came to nothing; suspect replicas that keep silent."""
        alive = set(replicas)
        if SILENT_CALLS:
            for entry in self._entries.values():
                if entry.asked.call in SILENT_CALLS:
                    self._suspect(entry, now_s)
        self._suspected_until_s = {
            r: s for r, s in self._suspected_until_s.items() if s > now_s and r in alive
        }
        self._entries = {
            request: entry
            for request, entry in self._entries.items()
            if entry.replica in alive
            and (entry.unrouted_since_s is None or now_s - entry.unrouted_since_s < UNROUTED_S)
        }

    def _suspect(self, entry: _Entry, now_s: float) -> None:
        self._suspected_until_s[entry.replica] = now_s + SUSPECT_S
        SILENT_CALLS.discard(entry.asked.call)

    def order(self, step_s: Mapping[str, float], asked: Asked) -> list[str]:
        """Replicas by the expected time to the request's last token; where that is equal, by all their work.

        Args:
            step_s: seconds a token takes at each replica; 0 where it is not known.
            asked: the new request.
        """
        known = [seconds for seconds in step_s.values() if seconds > 0]
        typical_s = sum(known) / len(known) if known else 1.0
        ahead = dict.fromkeys(step_s, asked.tokens)
        work = dict.fromkeys(step_s, 0)
        for entry in self._entries.values():
            if entry.replica in work:
                work[entry.replica] += entry.asked.tokens
                if entry.asked.goes_before(asked):
                    ahead[entry.replica] += entry.asked.tokens

        def cost(replica: str) -> tuple[bool, float, float]:
            seconds = step_s[replica] or typical_s
            return replica in self._suspected_until_s, ahead[replica] * seconds, work[replica] * seconds

        return sorted(step_s, key=cost)


class Slack:
    """How tight the deadlines at one replica are. Used by one thread."""

    def __init__(self) -> None:
        self._open: dict[int, Asked] = {}
        self._ended: list[tuple[float, bool]] = []  # when, and whether the deadline was met
        self._next_id = 0

    def begin(self, asked: Asked) -> int:
        """A request has come; its number."""
        self._next_id += 1
        self._open[self._next_id] = asked
        return self._next_id

    def end(self, number: int, is_refused: bool = False, now_s: float | None = None) -> None:
        """It has ended; refused because of its deadline counts as a miss."""
        asked = self._open.pop(number)
        now_s = time.monotonic() if now_s is None else now_s
        if asked.deadline_s < inf:
            self._ended.append((now_s, not is_refused and now_s <= asked.deadline_s))

    def pressure(self, step_s: float, num_running: int, now_s: float) -> float:
        """Time that is needed over time that is left, of the tightest deadline, at most 10.

        Args:
            step_s: seconds of a pass, which gives each running sequence a token.
            num_running: sequences that share a pass.
            now_s: on the monotonic clock.

        Returns:
            0 without deadlines; 1 where the tightest is just met; above 1 where it is not, or where some of
            the last 15 s were missed or refused.
        """
        tightest = 0.0
        for asked in self._open.values():
            if asked.deadline_s < inf:
                ahead = sum(other.tokens for other in self._open.values() if other.goes_before(asked))
                left_s = max(asked.deadline_s - now_s, 1e-3)
                tightest = max(tightest, step_s * ahead / max(1, num_running) / left_s)
        self._ended = [(when_s, is_met) for when_s, is_met in self._ended if now_s - when_s < RECENT_S]
        missed = sum(not is_met for _, is_met in self._ended)
        if missed:
            tightest = max(tightest, 1 + missed / len(self._ended))
        return min(tightest, MAX_PRESSURE)
