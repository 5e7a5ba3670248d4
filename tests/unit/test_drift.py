"""Fingerprints: what moves after an update is told from what rounds, is kept apart by maker, and survives damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import drift
from cluster.cli.drift import Drift
from cluster.cli.fingerprints import Fingerprints, Maker
from cluster.cli.verify_report import document, drift_line
from cluster.types import ModelId
from node.comparison import Floats
from node.fingerprint import sketch_of, steady_rms
from node.hardware import Device
from node.verdict import Verdict
from node.verification import Subject
from tests.unit.test_verification import CPU, FACTS, LAYERS, METAL, off_in_layer, report_of, stages, verdict_of

MODEL = ModelId("aa")
SUBJECT = Subject(Path("nowhere"), FACTS, stages(3))


def maker(version: str, hardware: str = "this") -> Callable[[Device], Maker]:
    return lambda device: Maker(device.backend, device.device, hardware, f"{device.backend} {version}")


def look(
    folder: Path, verdict: Verdict, version: str, *, accept: bool = False, hardware: str = "this"
) -> tuple[Drift, ...]:
    """What `potluck verify` does with a verdict that is within tolerance."""
    store, made_by = Fingerprints(folder), maker(version, hardware)
    found = drift.compare(SUBJECT, verdict, MODEL, 20, store, made_by)
    if accept or not any(one.beyond for one in found):
        drift.keep(SUBJECT, verdict, MODEL, 20, store, accept=accept, made_by=made_by)
    return found


def off(layer: int, by: float) -> Verdict:
    return verdict_of(off_in_layer(layer, by))


def test_the_first_run_has_nothing_to_compare_with(tmp_path: Path) -> None:
    (found,) = look(tmp_path, verdict_of(), "1.0")
    assert [layer.by for layer in found.layers] == [None] * LAYERS
    assert "the first one of 6 layers" in drift_line(found)


def test_the_second_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    look(tmp_path, verdict_of(), "1.0")
    (found,) = look(tmp_path, verdict_of(), "1.0")
    assert [(layer.identical, layer.by) for layer in found.layers] == [(True, 0.0)] * LAYERS
    assert "every bit as on" in drift_line(found)


@pytest.mark.parametrize("moved", range(LAYERS))
def test_a_layer_that_an_update_moved_is_named_and_no_other(moved: int, tmp_path: Path) -> None:
    look(tmp_path, verdict_of(), "1.0")
    (found,) = look(tmp_path, off(moved, 1e-3), "2.0")
    assert [layer.layers.first for layer in found.beyond] == [moved]
    assert 1e-4 < (found.beyond[0].by or 0) < 1e-2
    assert f"DRIFT since torch 1.0, {found.beyond[0].since.made}: layers {moved}," in drift_line(found)  # type: ignore[union-attr]


def test_what_only_rounds_otherwise_after_an_update_is_said_and_is_no_drift(tmp_path: Path) -> None:
    look(tmp_path, verdict_of(), "1.0")
    (found,) = look(tmp_path, off(2, 1e-6), "2.0")
    assert found.beyond == ()
    assert [layer.identical for layer in found.layers].count(False) == 1
    assert "moved within rounding since torch 1.0" in drift_line(found)


def test_drift_is_reported_until_it_is_accepted(tmp_path: Path) -> None:
    look(tmp_path, verdict_of(), "1.0")
    for _ in range(2):
        assert look(tmp_path, off(2, 1e-3), "2.0")[0].beyond
    look(tmp_path, off(2, 1e-3), "2.0", accept=True)
    assert not look(tmp_path, off(2, 1e-3), "2.0")[0].beyond
    assert look(tmp_path, verdict_of(), "1.0")[0].beyond  # going back is a change as well


def test_small_steps_do_not_add_up_unnoticed(tmp_path: Path) -> None:
    """Each version is within rounding of the one before; the sixth is not within rounding of the first."""
    found = [look(tmp_path, off(2, step * 6e-6), str(step))[0] for step in range(7)]
    assert not any(one.beyond for one in found[:3])
    assert found[6].beyond


def test_other_hardware_and_other_engines_are_not_compared(tmp_path: Path) -> None:
    look(tmp_path, verdict_of(), "1.0")
    assert not look(tmp_path, off(2, 1e-3), "1.0", hardware="that")[0].beyond
    mixed = Subject(Path("nowhere"), FACTS, stages(3, devices=(CPU, METAL)))
    on_two = verdict_of(off_in_layer(4, 1e-3), stages(3, devices=(CPU, METAL)))
    by_torch, by_mlx = drift.compare(mixed, on_two, MODEL, 20, Fingerprints(tmp_path), maker("2.0"))
    assert [layer.identical for layer in by_torch.layers] == [True] * 3
    assert [layer.by for layer in by_mlx.layers] == [None] * 3


def test_an_engine_that_becomes_nan_has_drifted(tmp_path: Path) -> None:
    look(tmp_path, verdict_of(), "1.0")
    (found,) = look(tmp_path, off(2, float("nan")), "2.0")
    assert [layer.layers.first for layer in found.beyond] == [2]
    report = replace(report_of(verdict_of()), drifts=(found,))
    assert json.loads(json.dumps(document(report), allow_nan=False))["drifted"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"shape": [8, ', '"shape": [80000000, '),
        lambda text: text.replace('"shape": [8, ', '"shape": [-8, -'),
        lambda text: text.replace('"backend": "torch"', '"backend": "abacus"'),
        lambda text: text.replace('"first": 0', '"first": 9'),
        lambda text: text.replace('"values": "', '"values": "!'),
        lambda text: text.replace('"layers": [', '"layers": [7, '),
        lambda text: '{"layers": []}',
        lambda text: "[1]",
    ],
)
def test_a_damaged_file_counts_as_none_and_is_named(damage: Callable[[str], str], tmp_path: Path) -> None:
    look(tmp_path, verdict_of(), "1.0")
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    store = Fingerprints(tmp_path)
    (found,) = drift.compare(SUBJECT, verdict_of(), MODEL, 20, store, maker("1.0"))
    assert [layer.by for layer in found.layers] == [None] * LAYERS
    assert store.damaged == {file.name}
    drift.keep(SUBJECT, verdict_of(), MODEL, 20, store, accept=False, made_by=maker("1.0"))
    assert file.read_text() == whole.replace(json.loads(whole)["made"], json.loads(file.read_text())["made"])


def test_a_change_of_any_element_changes_the_digest_and_a_sample_is_the_same_each_time() -> None:
    left: Floats = np.random.default_rng(0).normal(size=(9, 4096)).astype(np.float32)
    first = sketch_of(SUBJECT.layers[0].layers, 1.0, [left])
    np.testing.assert_array_equal(first.values, sketch_of(SUBJECT.layers[0].layers, 1.0, [left]).values)
    assert first.values.shape == (8, 256)
    for place in ((0, 0), (8, 4095)):
        other = left.copy()
        other[place] += 1
        assert sketch_of(SUBJECT.layers[0].layers, 1.0, [other]).digest != first.digest


def test_the_steady_input_is_as_large_as_the_references_and_does_not_follow_its_rounding() -> None:
    hidden = np.full((3, 4), 0.7, np.float32)
    assert steady_rms(hidden) == steady_rms(hidden * np.float32(1.001)) == 0.5
    assert steady_rms(hidden * 100) == 64
    assert steady_rms(np.zeros((3, 4), np.float32)) == 1
