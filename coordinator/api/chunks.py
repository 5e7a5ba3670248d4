"""A stream's chunks as bytes. What all chunks of a choice have in common is written once: of everything that the API
does with a token, writing JSON took longest.
"""

from __future__ import annotations

from typing import Final, Protocol

from coordinator.api.answer import Delta, Job
from coordinator.api.streaming import Object, json_text, sse

_MARK: Final = "\x00"
"""Stands for the text in a chunk that is taken apart. No name of a model holds it."""


class ChunkShape(Protocol):
    """How one of the two APIs writes a delta."""

    def chunk(self, job: Job, delta: Delta) -> Object: ...


class ChunkWriter:
    """Writes the chunks of one answer; `with_each` is in all of them."""

    def __init__(self, job: Job, shape: ChunkShape, with_each: Object) -> None:
        self._job = job
        self._shape = shape
        self._with_each = with_each
        self._around: dict[int, tuple[bytes, bytes]] = {}  # a choice's text

    def write(self, delta: Delta) -> bytes:
        if delta.end is not None or self._job.options.return_token_ids:
            return self._whole(delta)
        if delta.choice not in self._around:
            before, after = self._whole(Delta(delta.choice, _MARK, ())).split(json_text(_MARK))
            self._around[delta.choice] = before, after
        before, after = self._around[delta.choice]
        return before + json_text(delta.text) + after

    def _whole(self, delta: Delta) -> bytes:
        return sse({**self._shape.chunk(self._job, delta), **self._with_each})
