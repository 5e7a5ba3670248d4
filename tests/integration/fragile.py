"""A cluster whose nodes die: those that did are started again on demand, on their own state."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cluster.cli.child import Process
from tests.integration.live import START_S, Coordinator, eventually, has_backend, joined, new_cluster, serving


class Fragile:
    """A coordinator and its nodes. A node's name begins with its engine's."""

    def __init__(self, folder: Path, mdns: bool, stack: contextlib.ExitStack) -> None:
        self.cluster = new_cluster()
        self.nodes: dict[str, Process] = {}
        self.coordinator: Coordinator
        self._folder, self._mdns, self._stack = folder, mdns, stack

    def serve(self, model: Path, *options: str) -> None:
        options = ("--no-local-node", *options, *(() if self._mdns else ("--no-mdns",)))
        self.coordinator = self._stack.enter_context(serving(model, self.cluster, self._folder / "c", *options))

    def start(self, name: str) -> None:
        options = [] if self._mdns else ["--no-mdns", "--coordinator", f"127.0.0.1:{self.coordinator.port}"]
        backend = "mlx" if name.startswith("mlx") and has_backend("mlx") else "torch"
        node = joined(name, backend, self.cluster, self._folder / name, *options)
        self.nodes[name] = self._stack.enter_context(node)

    def restart_dead(self) -> None:
        for name, node in list(self.nodes.items()):
            if node.exit_code is not None:
                self.start(name)

    def whole(self) -> Coordinator:
        """The coordinator, once all nodes are there and it serves."""

        def serves() -> bool:
            self.restart_dead()
            present = len(self.coordinator.status()["nodes"]) == len(self.nodes)
            return present and self.coordinator.get("/ready").status_code == 200

        eventually(serves, "it serves", START_S)
        return self.coordinator

    def node_of(self, stage: int) -> Process:
        return self.nodes[self.coordinator.status()["plan"]["stages"][stage]["node"]]
