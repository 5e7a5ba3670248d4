"""The model that comes with Potluck, as files inside the package.

Knows where the files are; what reads them is another module's matter. How they are made is in
deploy/demo_model/.
"""

from __future__ import annotations

from pathlib import Path


def demo_model_path() -> Path:
    """The folder of the built-in model `demo`, laid out like any downloaded model."""
    return Path(__file__).parent / "demo"
