"""What travels on the data plane, as values. How it becomes bytes is `cluster.codec`'s business."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.narrowing import NarrowTensor
from cluster.plan import Fence
from cluster.steps import Boundary, Honoured, StageMark, Step, StepDone, StepFailed


class StreamRole(enum.StrEnum):
    """Why a data stream was opened."""

    UPSTREAM = "upstream"  # the caller sends frames for this stage
    RESULTS = "results"  # the caller is the coordinator and receives the last stage's outcomes


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message on every stream, in both directions; both sides must be in the same epoch."""

    fence: Fence
    stage: int
    role: StreamRole


@dataclass(frozen=True, slots=True)
class Frame:
    """A step on its way: its rows and verbs, and what the next layer needs to compute them.

    A stage that fails keeps forwarding the frame with `failure` set, so that the verbs reach every stage and
    the answer comes back on the one path that answers take.

    On a link where the coordinator asks for it, prompts' rows travel in `narrow` and only the others in `tensors`.
    """

    fence: Fence
    step: Step
    tensors: Boundary = ()
    honoured: tuple[Honoured, ...] = ()
    marks: tuple[StageMark, ...] = ()
    failure: StepFailed | None = None
    narrow: tuple[NarrowTensor, ...] = ()
    narrowing: tuple[int, ...] = ()  # the stages that send on in eight bits


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last stage's answer to a frame."""

    fence: Fence
    result: StepDone | StepFailed


Message = Hello | Frame | Outcome
