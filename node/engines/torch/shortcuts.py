"""Shorter ways from a module to its children.

A step calls hundreds of modules, and around each call torch looks the child up by name and asks for hooks, tracing
and the functions of the weight's type: several milliseconds of a step, however small the products. Nothing of that is
in use here, so a loaded slice calls what computes. Module trees, parameters and the library's code stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from node.engines.torch.ordered import Ordered
from node.engines.torch.products import Whole

_CONTAINERS = ("__getitem__", "__iter__", "__len__")


class Shortcut:
    """Stands where a module looks for its child; all but the call is the child's own."""

    __slots__ = ("_child", "_compute")

    def __init__(self, child: torch.nn.Module) -> None:
        self._child = child
        self._compute = _computing(child)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._compute(*args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """For code that asks what kind of module its child is."""
        return type(self._child)


class ShortcutList(list[Any]):
    """The same for a list of children. The library's own makes and checks a slice of itself as a module, each time."""

    def __init__(self, children: torch.nn.ModuleList) -> None:
        super().__init__(map(_shorter, children))
        self._children = children

    def __getattr__(self, name: str) -> Any:
        return getattr(self._children, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._children)


def take_shortcuts(model: torch.nn.Module) -> None:
    """Let every module of a loaded model call its children directly. Later changes to weights are not seen."""
    for module in model.modules():
        for name, child in module.named_children():
            is_list = type(child) is torch.nn.ModuleList
            vars(module)[name] = ShortcutList(child) if is_list else _shorter(child)


def _shorter(child: torch.nn.Module) -> torch.nn.Module | Shortcut:
    """A container is asked for more than a call, and a module with a way of its own to be called keeps it."""
    kind = type(child)
    plain = kind.__call__ is torch.nn.Module.__call__ and not any(hasattr(kind, name) for name in _CONTAINERS)
    hooked = child._forward_hooks or child._forward_pre_hooks
    return Shortcut(child) if plain and not hooked else child


def _computing(child: torch.nn.Module) -> Callable[..., Any]:
    weight = vars(child).get("weight")
    if type(child) is torch.nn.Linear and "forward" not in vars(child):
        if isinstance(weight, Ordered):
            return partial(weight.product, bias=child.bias)
        if isinstance(weight, Whole) and child.bias is None:
            return weight.product
    forward: Callable[..., Any] = child.forward
    return forward
