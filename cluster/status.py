"""Our errors as gRPC status codes, and back: an error raised on one machine is the same error on the other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import grpc
import grpc.aio

from cluster.errors import (
    ClusterError,
    DoesNotFit,
    ModelError,
    NodeLost,
    NodeRefused,
    PotluckError,
    RequestError,
    WireError,
)

_CODES: Final[tuple[tuple[type[PotluckError], grpc.StatusCode], ...]] = (
    (NodeRefused, grpc.StatusCode.FAILED_PRECONDITION),
    (DoesNotFit, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ModelError, grpc.StatusCode.DATA_LOSS),
    (WireError, grpc.StatusCode.INVALID_ARGUMENT),
    (RequestError, grpc.StatusCode.OUT_OF_RANGE),
    (ClusterError, grpc.StatusCode.ABORTED),
)


def code_of(error: PotluckError) -> grpc.StatusCode:
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)


def error_from(error: grpc.aio.AioRpcError, who: str) -> PotluckError:
    """What the other side meant; `who` names it to a person. Transport failures become NodeLost."""
    detail = error.details() or error.code().name.lower().replace("_", " ")
    if error.code() == grpc.StatusCode.UNKNOWN:  # it answered: its handler failed in a way it did not foresee
        return ClusterError(f"{who}: {detail}")
    for kind, code in _CODES:
        if error.code() == code:
            return kind(f"{who}: {detail}")
    return NodeLost(f"{who} did not answer: {detail}")


@contextmanager
def rpc_errors(who: str) -> Iterator[None]:
    """Turns what gRPC raises into our errors; `who` names the other side to a person.

    A call on a channel that was closed meanwhile ends in CancelledError, as if our own task had been cancelled.
    That is a lost node, not a request to stop."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from(error, who) from error
    except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
        # gRPC's words for a call on a stream or channel that is closed already.
        raise NodeLost(f"{who} hung up") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise NodeLost(f"{who} was given up while a call was under way") from error
