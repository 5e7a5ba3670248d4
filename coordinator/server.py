"""The life of a coordinator process: the HTTP endpoint, the gRPC server, discovery, a node on this machine, and
the controller that ties them together; until it is told to stop."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from cluster.advert import check_name
from cluster.discovery import Browser, NodeSighting
from cluster.errors import ClusterError, NoMulticast
from cluster.identity import host_id
from cluster.interfaces import Interface, best_addresses, choose_interfaces, host_port, read_interfaces
from cluster.limits import GRACE_S
from cluster.placement import Ask
from cluster.quantities import format_bytes
from cluster.state_dir import StateDir, default_state_path
from cluster.transport import Credentials, create_server
from cluster.types import CoordinatorId, NodeId
from cluster.wire.node_pb2_grpc import add_CoordinatorServicer_to_server, add_WeightsServicer_to_server
from coordinator.api.app import create_app
from coordinator.controller import Controller, Wish
from coordinator.deadlines import Deadlines
from coordinator.generation import ServedModel
from coordinator.happenings import Happening, Listening, Tell, Working
from coordinator.holders import Holders
from coordinator.http import serve_http
from coordinator.membership_service import CoordinatorService
from coordinator.narrowing import WireBits
from coordinator.opening import OpenModel, WantedModel, open_model
from coordinator.roster import Roster
from coordinator.service import InferenceService
from coordinator.status import status_of
from coordinator.text.histories import Histories
from coordinator.text.model import load_text_model
from coordinator.weights import WeightServer

_CONVERSIONS = "converted"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `potluck serve` was told, checked."""

    model: WantedModel
    http: socket.socket  # bound already
    http_host: str
    cluster: str
    cluster_host: str  # what nodes reach; empty for every interface
    cluster_port: int
    min_nodes: int
    ask: Ask
    deadlines: Deadlines  # of interactive requests
    exclude: tuple[str, ...]
    peers: tuple[str, ...]
    mdns: bool
    state: StateDir
    grace_s: float = GRACE_S  # for which answers wait when their plan broke
    prefix_cache: bool = True
    wire_bits: WireBits = WireBits.AS_COMPUTED


class Coordinator:
    """Everything of one coordinator process. `run` lives until `stop` is set or something cannot go on."""

    def __init__(self, options: ServeOptions, tell: Tell) -> None:
        self._options = options
        self._tell = tell
        self._credentials = Credentials()
        self._service = InferenceService(self._status, options.deadlines, grace_s=options.grace_s)
        self._weights = WeightServer()
        self._id = CoordinatorId(secrets.token_hex(16))
        self._roster = Roster(
            self._credentials,
            self._id,
            check_name(options.cluster, "--cluster"),
            exclude=frozenset(options.exclude),
            tell=tell,
        )
        self._interfaces = choose_interfaces(read_interfaces(), options.cluster_host or "0.0.0.0")
        self._model: OpenModel | None = None
        self._controller: Controller | None = None
        self._holders: Holders | None = None
        self._join: tuple[str, ...] = ()

    async def run(self, stop: asyncio.Event) -> None:
        self._options.http.listen()  # whoever has read the address may connect, and is answered in a moment
        async with AsyncExitStack() as stack:
            port = await self._listen(stack)
            await self._discover(stack, port)
            histories = Histories() if self._options.prefix_cache else Histories(turns_max=0)
            app = create_app(self._service, host=self._options.http_host, histories=histories)
            work = [
                asyncio.create_task(serve_http(app, self._options.http, stop)),
                asyncio.create_task(self._control(port)),
            ]
            stopping = asyncio.create_task(stop.wait())
            try:
                done, _ = await asyncio.wait((*work, stopping), return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                stop.set()
                stopping.cancel()
                # The answers that are being written get a moment to end before their pipeline does.
                await asyncio.gather(work[0], return_exceptions=True)
                work[1].cancel()
                await asyncio.gather(*work, stopping, return_exceptions=True)

    async def _listen(self, stack: AsyncExitStack) -> int:
        """Start the gRPC server that nodes announce to and fetch weights from; returns its port."""
        server = create_server()
        service = CoordinatorService(self._options.cluster, self._announced)
        add_CoordinatorServicer_to_server(service, server)
        add_WeightsServicer_to_server(self._weights, server)
        host = self._options.cluster_host or "::"
        try:
            port = self._credentials.bind(server, host_port(host, self._options.cluster_port))
        except ClusterError:
            # The usual port is only a convenience for `join --coordinator`; a second cluster takes another.
            port = self._credentials.bind(server, host_port(host, 0))
        await server.start()
        stack.push_async_callback(server.stop, 0.5)
        stack.callback(self._weights.close)
        stack.push_async_callback(self._roster.close)
        return port

    async def _discover(self, stack: AsyncExitStack, port: int) -> None:
        problem = await self._browse(stack, self._interfaces) if self._options.mdns else ""
        for peer in self._options.peers:
            self._roster.hint(peer, peer, (peer,))
        self._join = tuple(host_port(address, port) for address in best_addresses(self._interfaces))
        self._tell(Listening(self._id, self._options.cluster, port, self._join, problem))

    async def _browse(self, stack: AsyncExitStack, interfaces: Sequence[Interface]) -> str:
        browser = Browser(self._options.cluster, self._seen, self._gone, interfaces=interfaces)
        try:
            await browser.start()
        except NoMulticast as error:
            return str(error)
        stack.push_async_callback(browser.stop)
        return ""

    def _seen(self, sighting: NodeSighting) -> None:
        self._roster.hint(sighting.id, sighting.name, sighting.addresses, sighting.id)

    def _gone(self, node: NodeId) -> None:
        self._roster.forget(node)

    def _announced(self, address: str, node: NodeId) -> None:
        self._roster.hint(f"announced {node}", address, (address,), node)

    async def _control(self, port: int) -> None:
        options = self._options
        state = options.state.path
        model = await open_model(options.model, options.ask, state / "hashes", state / _CONVERSIONS, self._tell_opening)
        self._model = model
        text = await asyncio.to_thread(load_text_model, model.resolved.folder)
        self._weights.add(model.manifest, model.resolved.folder)
        self._service.set_model(
            ServedModel(
                name=model.resolved.name,
                aliases=frozenset(),
                created_s=int(time.time()),
                vocab_size=model.facts.vocab_size,
                context_tokens=None,
                text=text,
            )
        )
        wish = Wish(options.ask, options.min_nodes, host_id(options.state), options.prefix_cache, options.wire_bits)
        self._controller = Controller(model, wish, self._roster, self._service, self._credentials, port, self._tell)
        self._holders = Holders(model.manifest, self._roster)
        watching = asyncio.create_task(self._holders.watch())
        try:
            await self._controller.run()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def _tell_opening(self, happening: Happening) -> None:
        """Whoever asks the endpoint meanwhile is told how far it is."""
        if isinstance(happening, Working):
            done = f"{format_bytes(happening.done_bytes)} of {format_bytes(happening.total_bytes)}"
            self._service.set_phase("opening the model", f"{happening.what}: {done}")
        self._tell(happening)

    def _status(self) -> Mapping[str, object]:
        return status_of(
            cluster=self._options.cluster,
            phase=self._service.phase(),
            reason=self._service.reason,
            join=self._join,
            model=self._model,
            roster=self._roster,
            plan=self._controller.plan if self._controller else None,
            serving=self._controller.serving if self._controller else None,
            held=self._holders.held if self._holders else {},
        )


def coordinator_state(root: Path) -> Path:
    """The coordinator's own folder below `--state`: a node on this machine keeps to another one."""
    return root / "coordinator"


def conversions_folder(root: Path | None) -> Path:
    """Where this machine's coordinator keeps the folders that it made of GGUF files."""
    return coordinator_state(root or default_state_path()) / _CONVERSIONS
