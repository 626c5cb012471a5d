"""Requests that wait: in turn over the clients, so that one who asks a lot keeps nobody else waiting."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

from dartprune.serving.request import Ticket


class FairQueue:
    """At most `bound` tickets; those of one client in their order, clients in turn."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._lock = threading.Lock()
        self._clients: OrderedDict[str, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._clients.values()))

    def put(self, ticket: Ticket) -> bool:
        """Add a ticket; False where the bound is reached."""
        with self._lock:
            if sum(map(len, self._clients.values())) >= self.bound:
                return False
            self._clients.setdefault(ticket.ask.client, deque()).append(ticket)
            return True

    def peek(self) -> Ticket | None:
        """Whose turn it is, None if nobody waits."""
        with self._lock:
            return next(iter(self._clients.values()))[0] if self._clients else None

    def pop(self) -> Ticket:
        """Take the ticket whose turn it is; its client goes to the end."""
        with self._lock:
            client, waiting = next(iter(self._clients.items()))
            ticket = waiting.popleft()
            del self._clients[client]
            if waiting:
                self._clients[client] = waiting
            return ticket

    def all(self) -> list[Ticket]:
        """Those that wait."""
        with self._lock:
            return [ticket for waiting in self._clients.values() for ticket in waiting]

    def sweep(self) -> list[Ticket]:
        """Take out what was cancelled or has waited too long."""
        with self._lock:
            gone: list[Ticket] = []
            for client in list(self._clients):
                kept: deque[Ticket] = deque()
                for ticket in self._clients[client]:
                    (gone if ticket.cancelled or ticket.late else kept).append(ticket)
                if kept:
                    self._clients[client] = kept
                else:
                    del self._clients[client]
            return gone
