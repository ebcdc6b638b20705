"""The files of docker/ name files, settings and metrics that there are. Images are not built here."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import yaml
from prometheus_client import generate_latest

from project.serve.routes import Metrics
from project.serve.settings import ServeSettings

DOCKER = Path(__file__).parents[2] / "docker"


def test_compose_names_files_and_settings() -> None:
    content = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    mounted = [
        v.split(":")[0]
        for s in content["services"].values()
        for v in s.get("volumes", ())
        if v[0] == "."
    ]
    assert [name for name in mounted if not (DOCKER / name).is_file()] == []
    assert len(mounted) == 5
    known = {f"EXITREC_{f.name.upper()}" for f in fields(ServeSettings)}
    image = (DOCKER / "Dockerfile").read_text()
    assert {
        *content["services"]["server"]["environment"],
        *re.findall(r"EXITREC_\w+", image),
    } <= known
    copied = [
        name
        for names in re.findall(r"^COPY (.+) \S+$", image, re.M)
        for name in names.split()
    ]
    assert all((DOCKER.parent / name).exists() for name in copied)


def test_dashboard_names_metrics() -> None:
    names = re.findall(
        r"^# TYPE (\w+)",
        generate_latest(Metrics(lambda: 0, lambda: 0).registry).decode(),
        re.M,
    )
    panels = json.loads((DOCKER / "grafana/exitrec.json").read_text())["panels"]
    asked = {
        n
        for p in panels
        for t in p["targets"]
        for n in re.findall(r"exitrec_\w+", t["expr"])
    }
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in asked} <= set(names)


def test_gorse_sends_to_a_route_that_there_is() -> None:
    ranker = tomllib.loads((DOCKER / "gorse.toml").read_text())["recommend"]["ranker"]
    assert ranker["type"] == "llm"
    assert ranker["reranker_api"]["url"].endswith("/v1/rerank")
    assert "UserId" in ranker["query_template"]
