"""Names to engines, imported only when asked for: torch and mlx each take seconds."""

from __future__ import annotations

from typing import assert_never

from cluster.errors import UsageError
from cluster.types import Backend
from node.engine import Engine


def create_engine(backend: Backend) -> Engine:
    """A fresh engine, nothing loaded."""
    try:
        match backend:
            case Backend.TORCH:
                from node.engines.torch.engine import TorchEngine

                return TorchEngine()
            case Backend.MLX:
                from node.engines.mlx.engine import MlxEngine

                return MlxEngine()
            case _:
                assert_never(backend)
    except ImportError as error:
        raise UsageError(
            f"the {backend} engine cannot be imported ({error}); install it with: pip install 'potluck[{backend}]'"
        ) from error
