"""Results that survive a kill: one line of JSON per finished unit of a long piece of work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dartprune.errors import UserError

VERSION = 1
FIRST = b'{"journal": '


class Journal:
    """Finished units by key, appended to a file as they come and found again when the same work is started again.

    The first line holds the settings of the work. A last line that was cut short by a kill is dropped.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Open or continue a journal.

        Args:
            path: the file; None keeps everything in memory only.
            settings: what the results depend on, plain data.

        Raises:
            ValueError: the file belongs to work with other settings, or is no journal.
        """
        self.path = path
        self._done: dict[str, Any] = {}
        self._settings = json.loads(json.dumps(dict(settings)))
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not self._begun(path):
            self._read(path)
        else:
            path.write_bytes(b"")
            self._append({"journal": VERSION, "settings": self._settings})

    @staticmethod
    def _begun(path: Path) -> bool:
        """Whether nothing but a part of our own first line is there."""
        raw = path.read_bytes()
        return b"\n" not in raw and raw.startswith(FIRST[: len(raw)])

    def _read(self, path: Path) -> None:
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            head, *rows = [json.loads(line) for line in whole.decode().splitlines()]
        except ValueError:
            raise UserError(f"{path}: not a journal of results; remove it or choose another folder") from None
        if not isinstance(head, dict) or head.get("journal") != VERSION:
            raise UserError(f"{path}: not a journal of this version; remove it or choose another folder")
        if head["settings"] != self._settings:
            names = sorted({*head["settings"], *self._settings})
            other = [n for n in names if head["settings"].get(n) != self._settings.get(n)]
            raise UserError(
                f"{path}: holds results of other settings ({', '.join(other)}); remove it or choose another folder"
            )
        self._done = {row["key"]: row["value"] for row in rows}
        if len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def _append(self, row: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._done)

    def __len__(self) -> int:
        return len(self._done)

    def learn(self, units: Mapping[str, Any]) -> None:
        """Know units that another file keeps; they are not written here."""
        self._done.update(units)

    def adopt(self, other: Journal) -> None:
        """Keep the units of another journal of the same work that are not here."""
        for key in other:
            if key not in self:
                self.add(key, other[key])

    def add(self, key: str, value: Any) -> None:
        """Keep a finished unit: plain data; ValueError for a key that is there."""
        if key in self._done:
            raise ValueError(f"the journal holds {key!r} already")
        row = {"key": key, "value": value}
        if self.path is not None:
            self._append(row)
        self._done[key] = json.loads(json.dumps(row))["value"]
