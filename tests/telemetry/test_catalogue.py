"""Every metric is exposed and documented, and what dashboards and alerts ask for exists."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pdserve.telemetry.catalogue import CATALOGUE
from pdserve.telemetry.exposition import EXPECTED

from .support import Watched

ROOT = Path(__file__).resolve().parents[2]
NAMES = re.compile(r"pdserve_[a-z0-9_]+")


@pytest.fixture
def exposition() -> str:
    return Watched("prefill-0", "decode-0").exposition.render().decode()


def series_names() -> set[str]:
    """All series names that a query may use."""
    names: set[str] = set()
    for metric in CATALOGUE:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.full_name + suffix for suffix in suffixes}
    return names


def test_names_are_unique_and_units_stand_in_them() -> None:
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert "worker" not in metric.labels or metric.kind == "gauge", metric.name
        assert list(metric.bounds) == sorted(set(metric.bounds)), metric.name


def test_exactly_the_catalogued_metrics_are_exposed(exposition: str) -> None:
    exposed = {family.name: family for family in text_string_to_metric_families(exposition)}
    for metric in CATALOGUE:
        family = exposed.pop(metric.full_name.removesuffix("_total"))
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
    assert all(name.startswith("pdserve_process_") for name in exposed)


def test_series_that_are_known_before_are_there_from_the_start(exposition: str) -> None:
    for name, rows in EXPECTED.items():
        assert exposition.count(f"pdserve_{name}{{") == len(rows)
    assert "pdserve_time_to_first_token_seconds_count 0.0" in exposition
    assert 'pdserve_request_prefill_time_seconds_count{pool="prefill"} 0.0' in exposition


def test_the_operations_page_documents_every_metric() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `pdserve_(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    assert rows == [
        (metric.name, metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.meaning)
        for metric in CATALOGUE
    ]


def expressions(value: Any) -> Iterator[str]:
    """Every query in a dashboard or a rules file."""
    if isinstance(value, dict):
        for key, below in value.items():
            if key in ("expr", "query") and isinstance(below, str):
                yield below
            else:
                yield from expressions(below)
    elif isinstance(value, list):
        for below in value:
            yield from expressions(below)


@pytest.mark.parametrize("file", ["grafana.json", "alerts.yaml"])
def test_queries_name_metrics_that_exist(file: str, exposition: str) -> None:
    text = (ROOT / "dashboards" / file).read_text()
    queries = list(expressions(json.loads(text) if file.endswith("json") else yaml.safe_load(text)))
    asked = {name for query in queries for name in NAMES.findall(query)}
    assert len(queries) >= 5
    assert asked
    assert asked <= series_names() | set(re.findall(r"^(pdserve_process_\w+)", exposition, re.MULTILINE))


def test_the_dashboard_shows_every_metric_of_the_planner() -> None:
    dashboard = json.loads((ROOT / "dashboards" / "grafana.json").read_text())
    asked = {name for query in expressions(dashboard) for name in NAMES.findall(query)}
    planners = {metric.full_name for metric in CATALOGUE if metric.name.startswith("planner_")}
    assert planners and planners <= asked


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads((ROOT / "dashboards" / "grafana.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells), "panels lie over each other"
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert all(target["expr"] and target["refId"] for target in panel["targets"])
