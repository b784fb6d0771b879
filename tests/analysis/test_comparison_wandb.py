"""A comparison in W&B: offline as wandb itself writes it, and a report as a server would get it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_runs import healthy_losses, write_curve_run
from test_arms import QUANTIZED
from test_comparison import pair_of_arms

from qtrain import cli
from qtrain.analysis import comparison_wandb
from qtrain.analysis.comparison import Comparison, compare
from qtrain.analysis.comparison_wandb import charts, check_report, log
from qtrain.analysis.run_records import read_run

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from wandb_records import records as records_of


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """base and arm of three seeds, and a|b, of one, with logged SQNR."""
    logged = [{"step": s, "quant/blocks.0.mlp/fprop.input/sqnr_db": 20.0 - s / 10} for s in (20, 40)]
    runs = [*pair_of_arms(tmp_path)]
    more = write_curve_run(tmp_path, "a|b", 0, healthy_losses(100, 9), instruments=logged, **QUANTIZED, tag=1)
    return compare([*runs, read_run(more)])


def test_the_charts_are_those_of_the_comparison(comparison: Comparison) -> None:
    found = charts(comparison)
    assert set(found) == {"charts/val_loss", "charts/gap", "charts/lowest_sqnr"}
    gap = {row[0]: row[1] for row in found["charts/gap"].table.data}
    assert gap == {r.label: pytest.approx(100 * r.gap_fraction.mean) for r in comparison.arms[1:]}  # type: ignore[union-attr]
    assert found["charts/lowest_sqnr"].table.data == [["a|b", 16.0]]
    curve = [row for row in found["charts/val_loss"].table.data if row[1] == "base"]
    assert [row[0] for row in curve] == [640, 1280, 1920, 2560, 3200]
    assert {row[1] for row in found["charts/val_loss"].table.data} == {"base", "arm", "a|b"}
    assert found["charts/gap"].spec.string_fields["title"] == "Gap to base, % of its loss"


def test_of_a_baseline_alone_there_is_its_curve(tmp_path: Path) -> None:
    alone = compare([read_run(write_curve_run(tmp_path, "base", 0, healthy_losses(100, 0)))])
    assert set(charts(alone)) == {"charts/val_loss"}


def test_an_offline_run_holds_table_charts_and_page(comparison: Comparison, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>hello</p>")
    (lies,) = log(comparison, "qtrain compare runs=[a]", page, mode="offline", project="p", dir=str(tmp_path))
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert str(run) in lies
    (table,) = run.glob("files/media/table/comparison_*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"][0] == "arm"
    assert [row[0] for row in found["data"]] == ["base", "arm", "a|b"]
    assert len(list(run.glob("files/media/table/charts/*.table.json"))) == 3
    assert len(list(run.glob("files/media/html/*.html"))) == 1
    (log_file,) = run.glob("*.wandb")
    said = b"".join(r.SerializeToString() for r in records_of(log_file))
    for part in (b"wandb/bar/v0", b"wandb/lineseries/v0", b"qtrain compare runs=[a]"):
        assert part in said


class FakeApi:
    """What wandb-workspaces asks of ``wandb.Api``, and what a server would get."""

    default_entity = "me"

    def __init__(self) -> None:
        self.sent: dict[str, Any] = {}
        self.client = SimpleNamespace(app_url="https://server.test")

    def projects(self, entity: str) -> list[Any]:
        assert entity == "me"
        return [SimpleNamespace(name="p")]

    def execute(self, api: Any, query: Any, variables: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        if "spec" not in variables:  # which project a set of runs is of
            return {"project": {"internalId": "42"}}
        self.sent = variables
        view = {
            "id": "abc", "name": "n", "displayName": variables["displayName"], "description": variables["description"],
            "project": {"name": "p", "entityName": "me"}, "spec": variables["spec"],
            "createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00", "user": {},
        }  # fmt: skip
        return {"upsertView": {"view": view}}


@pytest.fixture
def online_run(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In the place of ``wandb.init``: what was logged."""
    logged: dict[str, Any] = {}

    def init(**settings: Any) -> Any:
        logged["settings"] = settings
        return SimpleNamespace(
            log=logged.update, url="https://server.test/me/p/runs/r", dir="", project="p", entity="me", finish=lambda: None
        )  # fmt: skip

    monkeypatch.setattr("wandb.init", init)
    return logged


def test_a_report_is_sent_to_a_server(
    comparison: Comparison, online_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = pytest.importorskip(
        "wandb_workspaces.reports.v2.interface", reason="pip install wandb-workspaces"
    )
    api = FakeApi()
    monkeypatch.setattr(interface, "_get_api", lambda: api)
    monkeypatch.setattr(interface, "execute_graphql", api.execute)
    monkeypatch.setattr(interface, "get_app_url", lambda api: api.client.app_url)
    places = log(comparison, "qtrain compare runs=[a]", None, mode="online", report=True, project="p")
    assert places[0] == "https://server.test/me/p/runs/r"
    assert places[1].startswith("https://server.test/me/p/reports/Comparison-against-base--abc")
    assert set(online_run) == {
        "settings",
        "comparison",
        "charts/val_loss",
        "charts/gap",
        "charts/lowest_sqnr",
    }
    assert (api.sent["displayName"], api.sent["description"]) == (
        "Comparison against base",
        "qtrain compare runs=[a]",
    )
    spec = json.loads(api.sent["spec"])
    text = json.dumps(spec)
    assert any("a\\|b" in json.dumps(b).replace("\\\\", "\\") for b in spec["blocks"])  # a name is no column
    assert "arm seed 2: healthy: 100 steps without an alarm" in text
    (grid,) = [block for block in spec["blocks"] if block["type"] == "panel-grid"]
    assert "val/loss" in json.dumps(grid)
    assert '"tokens"' in json.dumps(grid)


def test_a_report_has_the_comparisons_text(
    comparison: Comparison, online_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the library: which blocks it is asked for."""
    blocks: list[Any] = []

    class Module:
        def __getattr__(self, name: str) -> Any:
            if name == "Report":
                return self._report
            return lambda *arguments, **named: (name, arguments, named)

        def _report(self, **given: Any) -> Any:
            blocks.extend(given["blocks"])
            assert len(given["title"]) <= 128
            return SimpleNamespace(save=lambda: blocks.append("saved"), url="https://report")

    package = SimpleNamespace(v2=Module())
    monkeypatch.setitem(sys.modules, "wandb_workspaces", SimpleNamespace(reports=package))
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports", package)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", package.v2)
    object.__setattr__(comparison.baseline.arm, "label", "b" * 200)
    assert log(comparison, "c", None, mode="online", report=True)[1] == "https://report"
    assert blocks[-1] == "saved"
    table = next(b[1][0] for b in blocks if b[0] == "MarkdownBlock")
    assert "| a\\|b | 1 healthy |" in table
    assert "16.0 dB blocks.0.mlp fprop.input (step 40)" in table
    (grid,) = [b for b in blocks if b[0] == "PanelGrid"]
    assert grid[2]["runsets"] == [("Runset", (), {"project": "p", "entity": "me", "name": "runs by arm", "groupby": ["group"]})]  # fmt: skip
    assert next(panel[2]["y"] for panel in grid[2]["panels"]) == ["val/loss"]


def test_a_report_that_cannot_be_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison_wandb, "find_spec", lambda name: None)
    for logs, mode, says in (
        (False, "online", "pass wandb=true too"),
        (True, "offline", "the mode is offline; log in"),
        (True, "online", r"pip install 'qtrain\[wandb-report\]'"),
    ):
        with pytest.raises(ValueError, match=says):
            check_report(logs=logs, mode=mode)
    monkeypatch.setattr(comparison_wandb, "find_spec", lambda name: object())
    check_report(logs=True, mode="online")
    (tmp_path / "runs").mkdir()
    words = [
        f"runs=[{tmp_path / 'runs'}]",
        "html=false",
        "wandb=true",
        "wandb_mode=offline",
        "wandb_report=true",
    ]
    assert cli.main(["compare", *words, f"out={tmp_path / 'out'}"]) == 2
    assert "a report needs W&B's server" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
