"""`potluck verify --url` verifies the weights that the cluster serves: its commit, its folder, its GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli.verify import VerifyCommand, _resolve, _wanted_model, verify_command
from cluster.cli.verify_cut import RunningPlan, read_plan
from cluster.cli.verify_report import Telling
from cluster.errors import ClusterError, UsageError
from cluster.models.checkpoint import Checkpoint
from cluster.models.manifest import assemble
from cluster.transport import Credentials
from cluster.types import CoordinatorId
from coordinator.builtin import demo_model_path
from coordinator.hub import LOCAL_REVISION, ResolvedModel, resolve_model
from coordinator.opening import OpenModel
from coordinator.roster import Roster
from coordinator.status import status_of
from tests.clusters import model

COMMIT = "3" * 40
FOLDER = Path("/served")
PINNED = ResolvedModel(FOLDER, "org/m", COMMIT, "https://hub/org/m", "org/m")


def running(resolved: ResolvedModel) -> RunningPlan:
    """What `verify` reads in the status of a coordinator that serves this model."""
    opened = OpenModel(resolved, Checkpoint(resolved.folder, {}, {}), model([50] * 3), assemble("", "", [], []))
    roster = Roster(Credentials(), CoordinatorId("0"), "paper", tell=lambda _: None)
    status = status_of(
        cluster="paper",
        phase="serving",
        reason="",
        join=(),
        model=opened,
        roster=roster,
        plan=None,
        serving=None,
        held={},
    )
    stage = {"node": "a", "backend": "mlx", "first_layer": 0, "last_layer": 3}
    return read_plan({**status, "plan": {"stages": [stage]}})


def local(source: Path) -> RunningPlan:
    return running(ResolvedModel(FOLDER, source.name, LOCAL_REVISION, "", str(source)))


def test_the_commit_that_is_served_is_verified() -> None:
    assert _wanted_model(None, running(PINNED)) == ("org/m", COMMIT)


def test_naming_the_model_that_is_served_leaves_its_commit() -> None:
    assert _wanted_model("org/m", running(PINNED)) == ("org/m", COMMIT)


@pytest.mark.parametrize("named", ["org/m@v2", "org/other", "models/m"])
def test_what_is_named_otherwise_is_what_is_verified(named: str) -> None:
    assert _wanted_model(named, running(PINNED)) == (named, None)


def test_a_file_on_the_hub_is_named_in_full() -> None:
    resolved = ResolvedModel(FOLDER, "org/m/x.Q4_K", COMMIT, "https://hub/org/m", "org/m/x.Q4_K.gguf")
    assert _wanted_model(None, running(resolved)) == ("org/m/x.Q4_K.gguf", COMMIT)


def test_the_revision_reaches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(text: str, *, revision: str | None = None, **_: object) -> ResolvedModel:
        raise ClusterError(f"asked for {text} at {revision}")

    stage = {"node": "a", "backend": "mlx", "first_layer": 0, "last_layer": 3}
    served = {"source": "org/m", "revision": COMMIT, "bits": None}
    status = {"model": served, "nodes": [], "plan": {"stages": [stage]}}
    monkeypatch.setattr("cluster.cli.verify.Endpoint.get", lambda *_: status)
    monkeypatch.setattr("cluster.cli.verify.resolve_model", asked)
    with pytest.raises(ClusterError, match=f"asked for org/m at {COMMIT}"):
        verify_command(VerifyCommand(None, url="http://127.0.0.1:1", state=tmp_path))


def test_a_folder_with_the_name_of_the_model_on_the_hub_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/m").mkdir(parents=True)
    with Telling() as tell, pytest.raises(UsageError, match=f"commit {COMMIT} of org/m, which means {tmp_path}"):
        _resolve("org/m", COMMIT, tmp_path, tell)


def test_a_folder_is_verified_where_it_lies_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert _wanted_model(None, local(tmp_path / "demo")) == (str(tmp_path / "demo"), None)


def test_a_gguf_file_is_verified_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    assert _wanted_model(None, local(tmp_path / "m.gguf")) == (str(tmp_path / "m.gguf"), None)


def test_the_built_in_model_is_on_every_machine() -> None:
    resolved = resolve_model("demo", conversions=Path())
    assert resolved.folder == demo_model_path()
    assert _wanted_model(None, running(resolved)) == ("demo", None)


@pytest.mark.parametrize("source", ["/no/such/folder", "tests", "/" + "x" * 300])
def test_a_folder_that_is_not_here_is_asked_for(source: str) -> None:
    plan = running(ResolvedModel(FOLDER, "m", LOCAL_REVISION, "", source))
    with pytest.raises(UsageError, match="name MODEL as well: its folder on this machine"):
        _wanted_model(None, plan)
    assert _wanted_model("models/m", plan) == ("models/m", None)


def test_a_status_without_a_source_is_refused() -> None:
    stage = {"node": "a", "backend": "mlx", "first_layer": 0, "last_layer": 3}
    status = {"model": {"name": "m", "bits": None}, "nodes": [], "plan": {"stages": [stage]}}
    with pytest.raises(ClusterError, match="does not say which model"):
        read_plan(status)
