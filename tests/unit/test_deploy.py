"""The files in deploy/, as far as they can be checked without the systems that they are for."""

from __future__ import annotations

import configparser
import fnmatch
import json
import plistlib
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cluster.cli.main import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = ("potluck-node.service", "potluck-coordinator.service")


def _unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Sections, and for each key every value that it is given."""

    class Repeats(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            if isinstance(value, list) and key in self:
                self[key].extend(value)
            else:
                super().__setitem__(key, value)

    parser = configparser.RawConfigParser(
        dict_type=Repeats, strict=False, delimiters=("=",), comment_prefixes=("#",), empty_lines_in_values=False
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / name).read_text())
    return {section: {key: value.split("\n") for key, value in parser.items(section)} for section in parser.sections()}


def _environment(name: str) -> dict[str, str]:
    pairs = (value.partition("=") for value in _unit(name)["Service"]["Environment"])
    return {key: value for key, _, value in pairs}


def _dockerfile() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def _compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return document


def _plist() -> dict[str, Any]:
    document: dict[str, Any] = plistlib.loads((DEPLOY / "com.potluck.node.plist").read_bytes())
    return document


def _command_lines() -> dict[str, list[str]]:
    """Every `potluck ...` that the files run or show as an example, without the word itself."""
    found = {}
    for name in UNITS:
        environment = _environment(name)
        examples = dict(re.findall(r"(POTLUCK_\w+_OPTIONS)=(--.*)", (DEPLOY / name).read_text()))
        (line,) = _unit(name)["Service"]["ExecStart"]
        for kind, values in (("", environment), (" with its example", {**environment, **examples})):
            filled = re.sub(r"\$\{?(\w+)\}?", lambda match, values=values: values[match[1]], line)
            found[name + kind] = shlex.split(filled)[2:]
    shell = _plist()["ProgramArguments"][2]
    found["com.potluck.node.plist"] = shlex.split(re.search(r"exec potluck ([^>]*)", shell)[1])  # type: ignore[index]
    found["Dockerfile"] = json.loads(dict(_dockerfile())["CMD"])
    for service, facts in _compose()["services"].items():
        found[f"compose.yaml {service}"] = facts["command"]
    readme = (DEPLOY / "README.md").read_text()
    found["README.md"] = ["join", *shlex.split(re.search(r"POTLUCK_JOIN_OPTIONS=([^`]*)`", readme)[1])]  # type: ignore[index]
    return found


@pytest.mark.parametrize("where", sorted(_command_lines()))
def test_every_command_line_is_one_that_potluck_takes(where: str) -> None:
    command, *arguments = _command_lines()[where]
    group = typer.main.get_command(app)
    assert command in group.commands  # type: ignore[attr-defined]
    # Parses and checks each option without running the command; click raises on anything unknown.
    group.commands[command].make_context(command, list(arguments))  # type: ignore[attr-defined]


# -- systemd ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
def test_systemd_itself_accepts_the_unit_without_a_word(name: str) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed; the unit is only parsed, by the other tests")
    result = subprocess.run(
        [tool, "verify", "--man=no", str(DEPLOY / name)], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_keeps_its_state_where_it_may_write(name: str) -> None:
    (folder,) = _unit(name)["Service"]["StateDirectory"]
    assert _environment(name)["POTLUCK_HOME"] == f"%S/{folder}"


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_restarts_after_a_failure_but_not_after_a_wrong_argument(name: str) -> None:
    service = _unit(name)["Service"]
    assert service["Restart"] == ["on-failure"]
    assert service["RestartPreventExitStatus"] == ["2"]


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_may_not_gain_rights_nor_write_elsewhere(name: str) -> None:
    service = _unit(name)["Service"]
    assert service["DynamicUser"] == service["NoNewPrivileges"] == ["yes"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["CapabilityBoundingSet"] == [""]


def test_the_node_may_use_gpus_and_compile_kernels() -> None:
    assert not {"PrivateDevices", "MemoryDenyWriteExecute"} & _unit("potluck-node.service")["Service"].keys()


# -- launchd ---------------------------------------------------------------------------------------------


def test_the_launch_agent_starts_at_login_and_again_after_a_failure() -> None:
    agent = _plist()
    assert agent["Label"] == "com.potluck.node"
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}


def test_the_launch_agents_shell_line_finds_potluck_in_the_persons_own_folder(tmp_path: Path) -> None:
    (tmp_path / ".local/bin").mkdir(parents=True)
    (tmp_path / "Library/Logs").mkdir(parents=True)
    stand_in = tmp_path / ".local/bin/potluck"
    stand_in.write_text('#!/bin/sh\necho "ran: $*"\n')
    stand_in.chmod(0o755)
    shell, *arguments = _plist()["ProgramArguments"]
    subprocess.run([shell, *arguments], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, timeout=10, check=True)
    assert (tmp_path / "Library/Logs/potluck-node.log").read_text() == "ran: join\n"


# -- Containers ------------------------------------------------------------------------------------------


def _copied() -> list[str]:
    return [source for word, rest in _dockerfile() if word == "COPY" for source in rest.split()[:-1]]


def test_the_image_copies_only_what_exists_and_what_the_builder_is_sent() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignore if line.startswith("!")]
    for source in _copied():
        assert (ROOT / source).exists(), f"COPY {source}: no such file in the repository"
        assert any(fnmatch.fnmatch(source, pattern) for pattern in sent), f"COPY {source}: the dockerignore drops it"


def test_the_image_copies_every_package_and_file_that_the_build_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed <= set(_copied())


def test_the_image_installs_an_engine_that_is_an_extra_of_ours() -> None:
    arguments = dict(rest.split("=", 1) for word, rest in _dockerfile() if word == "ARG")
    (install,) = [rest for word, rest in _dockerfile() if word == "RUN" and "pip install" in rest]
    filled = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], install)
    extra = re.search(r"\.\[(\w+)\]", filled)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extra is not None
    assert extra[1] in extras


def test_the_image_does_not_run_as_root() -> None:
    words = [word for word, _ in _dockerfile()]
    assert dict(_dockerfile())["USER"] != "root"
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert json.loads(dict(_dockerfile())["ENTRYPOINT"]) == ["potluck"]


@pytest.mark.parametrize("service", ["coordinator", "node"])
def test_a_service_is_on_the_hosts_network_and_keeps_its_state_in_a_declared_volume(service: str) -> None:
    document = _compose()
    facts = document["services"][service]
    state = dict(rest.split("=", 1) for rest in dict(_dockerfile())["ENV"].split())["POTLUCK_HOME"]
    mounts = dict(volume.split(":")[:2] for volume in facts["volumes"])
    (volume,) = [source for source, target in mounts.items() if target == state]
    assert facts["network_mode"] == "host"
    assert volume in document["volumes"]


@pytest.mark.parametrize("service", ["coordinator", "node"])
def test_a_service_is_built_from_the_dockerfile_beside_it(service: str) -> None:
    build = _compose()["services"][service]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
