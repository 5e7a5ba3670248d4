"""The vocabulary that nodes and the coordinator share.

It knows neither role, and imports neither torch nor mlx.
"""

__version__ = "0.1.0"
