"""Every error that the system raises on purpose.

PotluckError
├── UserError                  their fault: the message says what to change (exit code 1, or HTTP 4xx)
│   ├── UsageError             a wrong argument (exit code 2)
│   ├── ModelError             the model's files cannot be used: missing, damaged, unknown architecture
│   ├── DoesNotFit             no placement exists; the message says what is missing and what would fit
│   └── RequestError           a request that cannot be served as asked; carries the field's name
│       └── AtCapacity         try again later (HTTP 429)
├── ClusterError               the cluster's fault, not the request's
│   ├── NodeRefused            a node said no: leased elsewhere, wrong cluster, wrong protocol version
│   ├── NodeLost               a node or link stopped answering
│   ├── LoadFailed             a node could not load its slice; carries the node
│   ├── NoMulticast            mDNS cannot start here; machines must be named instead
│   ├── NotReady               no plan is installed yet (HTTP 503)
│   ├── DeadlineExceeded       a request took longer than it may (HTTP 408 or 504)
│   ├── BadLogits              a model computed NaN or infinity, or nothing may be drawn
│   └── StepTimeout            a step did not come back within its deadline
└── WireError                  a frame or message that breaks the contract
    └── StaleFrame             a frame of another deployment or epoch; dropped, never an accident

Programmer errors are not in this tree: they crash.
"""

from __future__ import annotations

from cluster.types import NodeId


class PotluckError(Exception):
    """An operating error with a message fit to be shown."""


class UserError(PotluckError):
    """Something that the person or client can change."""


class UsageError(UserError):
    """A wrong argument."""


class ModelError(UserError):
    """The model's files cannot be used."""


class DoesNotFit(UserError):
    """No placement of this model on these nodes exists."""


class RequestError(UserError):
    """A request that cannot be served as asked; `field` names the culprit."""

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class AtCapacity(RequestError):
    """The queue is full; the client should come back after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after_s = retry_after_s


class ClusterError(PotluckError):
    """The cluster could not do its part."""


class NodeRefused(ClusterError):
    """A node said no."""


class NodeLost(ClusterError):
    """A node or a link stopped answering."""


class LoadFailed(ClusterError):
    """`node` could not load its slice, for the reason in the message."""

    def __init__(self, message: str, *, node: str) -> None:
        super().__init__(message)
        self.node = NodeId(node)


class NoMulticast(ClusterError):
    """mDNS cannot start on this machine's interfaces."""


class NotReady(ClusterError):
    """Nothing can be served yet."""


class DeadlineExceeded(ClusterError):
    """A request took too long. `code` names the limit; `field` is the request's own that set it, if one did."""

    def __init__(self, message: str, *, code: str, field: str | None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class BadLogits(ClusterError):
    """No token can be drawn: the logits are not finite, or every token is banned."""


class StepTimeout(ClusterError):
    """A step did not come back in time."""


class WireError(PotluckError):
    """Bytes that break the contract."""


class StaleFrame(WireError):
    """A frame of another deployment or epoch."""
