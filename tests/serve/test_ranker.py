"""Tests the ranker: it scores as `predict --engine early_exit` does, whatever was asked or happened before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from world import given

from project.api import open_run
from project.data.requests import request_of
from project.export import export
from project.request import HistoryRow, Item, RankRequest, Scored
from project.serve.ranker import Ranker
from project.serve.settings import ServeSettings
from project.serve.store import Event, EventStore

FRESH = {"item_id": "new", "title": "a dog at sea", "year": "2020"}
ITEMS = [f"i{k}" for k in range(20)]
PAST = [
    {"item_id": f"i{k % 20}", "label": k % 2, "time": 1000.0 + k // 2} for k in range(60)
]
REQUESTS = [
    {"user_id": "u1", "candidates": ["i3", FRESH, "i0", "i3"]},
    {"user_id": "u2", "candidates": [*ITEMS, FRESH | {"item_id": "newer"}]},
    {"user_id": "nobody", "candidates": ["i1"]},
    {"history": [], "candidates": ["i1", "i2"]},
    {"history": PAST, "candidates": ITEMS[:7]},
    {
        "history": [FRESH | {"label": 1, "time": 1000.0}, *PAST[:3]],
        "candidates": ["new", "i7"],
    },
    {
        "history": [{"item_id": f"i{k}", "rating": k / 2} for k in range(9)],
        "candidates": ITEMS,
    },
    {
        "history": [{"item_id": f"i{k}", "label": k % 2} for k in (7, 1, 4)],
        "candidates": [{"title": "x y"}, "i9"],
    },
]
pytestmark = pytest.mark.slow


def asked(record: dict[str, Any], **about: Any) -> RankRequest:
    return replace(request_of({"request_id": ""} | record), **about)


def close(found: Scored, expected: Scored) -> None:
    assert found.error is None
    np.testing.assert_array_equal(found.exit_layers, expected.exit_layers)
    np.testing.assert_allclose(
        found.probabilities, expected.probabilities, rtol=0, atol=1e-4
    )


def test_scores_are_those_of_predict(
    ranker: Ranker, served_run: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    """Known, unseen and anonymous users, items that requests bring, a history beyond the window, one without times.

    From Python and by the ranker, alone and together, cold, cached and evicted: to 1e-6.
    """
    path = tmp_path / "requests.jsonl"
    path.write_text(
        "\n".join(json.dumps(r | {"request_id": str(k)}) for k, r in enumerate(REQUESTS))
    )
    run("predict", *given(served_run), "--data.requests", path, "--engine", "early_exit")
    scores = pl.read_parquet(served_run / "scores" / "predict-early_exit.parquet")
    assert scores["error"].null_count() == len(scores)
    requests = [asked(record) for record in REQUESTS]
    ways = [open_run(served_run).score_after_log(requests)["probability"].to_numpy()]
    for made in (ranker, ranker, Ranker.load(served_run, cache_mib=0, audit_share=0.0)):
        alone = [made.rank_after_log([request])[0] for request in requests]
        for found in (alone, made.rank_after_log(requests)):
            ways.append(np.concatenate([one.probabilities for one in found]))
            layers = np.concatenate([one.exit_layers for one in found])
            np.testing.assert_array_equal(layers, scores["exit_layer"])
    for way in ways:
        np.testing.assert_allclose(way, scores["probability"], rtol=0, atol=1e-6)
    assert len(set(scores["exit_layer"])) >= 3


def test_lists_are_those_of_predict(
    ranker: Ranker, served_run: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    """Lists, all scores and both exhaustively: items, exits and, to 1e-6, probabilities; from Python and by the ranker.

    Alone and together, in any order, cold, cached and evicted.
    """
    records = [
        record | more | {"request_id": f"{k}{more}"}
        for k, record in enumerate(REQUESTS)
        for more in ({}, {"top_n": 2}, {"top_n": 4, "exhaustive": True}, {"top_n": 9})
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    run("predict", *given(served_run), "--data.requests", path, "--engine", "early_exit")
    scores = pl.read_parquet(served_run / "scores" / "predict-early_exit.parquet")
    assert scores["error"].null_count() == len(scores)
    expected = scores.partition_by("request_id", maintain_order=True)
    requests = [request_of(record) for record in records]
    python = open_run(served_run).score_after_log(requests)
    np.testing.assert_allclose(
        python["probability"], scores["probability"], rtol=0, atol=1e-6
    )
    mixed = np.random.default_rng(0).permutation(len(requests))
    left = set[int]()
    for made in (ranker, ranker, Ranker.load(served_run, cache_mib=0, audit_share=0.0)):
        alone = [made.rank_after_log([request])[0] for request in requests]
        together = made.rank_after_log([requests[k] for k in mixed])
        ordered = [together[k] for k in np.argsort(mixed)]
        for found in (alone, ordered):
            for request, one, table in zip(requests, found, expected, strict=True):
                listed = sorted(one.best_first(request.top_n))
                assert listed == table["candidate_index"].to_list()
                assert one.exit_layers[listed].tolist() == table["exit_layer"].to_list()
                np.testing.assert_allclose(
                    one.probabilities[listed], table["probability"], rtol=0, atol=1e-6
                )
                if one.list_of:
                    assert set(table["exit_layer"]) == {3}
                    left |= set(one.left_at)
    assert len(left) >= 3


EVENTS = [
    Event("a", "u1", "i7", 1, 2000.0),
    Event("b", "somebody", "i7", 0, 2001.0, rating=1.5),  # a new user
    Event("c", "u1", "fresh", 1, 2002.0),  # a new item
    Event("d", "u1", "i4", 0, 1500.0),  # late
    Event("e", "somebody", "no title", 1, 2002.0),  # a new item without a title
]
AFTER = [
    RankRequest("u1", None, ["i3", "i7", "fresh"]),
    RankRequest("somebody", None, ["i1", "no title", Item("m", "a mountain")]),
    RankRequest("u2", None, ["i7", "fresh"]),
]


def test_a_restart_is_as_if_it_had_gone_on(
    ranker: Ranker, served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With requests between events, posted twice or late, and a cache that keeps nothing: same answers as by replay.

    What was answered with one event is what a server answers that never got the others.
    """
    store = EventStore(f"sqlite:///{tmp_path}/events.db")
    other = Ranker.load(served_run, cache_mib=0, audit_share=0.0)
    other.observe(EVENTS[:1], [])
    store.add(EVENTS[:1])
    ranker.follow(store)
    first = [ranker.rank_after_log([request])[0] for request in AFTER[2:]]
    assert first[0].error is not None  # nobody knows the item yet
    early = ranker.rank_after_log([asked(record) for record in REQUESTS])
    store.put_items([{"item_id": "fresh", "title": "a dog in winter", "year": "2001"}])
    for event in EVENTS[1:]:
        store.add([event, EVENTS[0]])
        ranker.follow(store)
        ranker.rank_after_log([asked(REQUESTS[0])])
    went_on = ranker.rank_after_log(AFTER)
    for found, expected in zip(
        other.rank_after_log([asked(record) for record in REQUESTS]), early, strict=True
    ):
        close(found, expected)
    restarted = Ranker.load(served_run, cache_mib=0, audit_share=0.0)
    restarted.follow(store)
    for request, expected in zip(AFTER, went_on, strict=True):
        close(restarted.rank_after_log([request])[0], expected)
        np.testing.assert_equal(
            restarted.rank_after_log([request])[0].features, expected.features
        )
    assert restarted.user("u1")["history"] == ranker.user("u1")["history"]
    assert [(row["item_id"], row["time"]) for row in ranker.user("u1")["history"]][-3:] == [
        *(("i7", 2000.0), ("fresh", 2002.0), ("i4", 1500.0)),
    ]
    by_title = RankRequest("u2", None, [Item(title="a dog in winter")])
    assert ranker.rank_after_log([by_title])[0].item_ids == ["fresh"]
    assert [ranker.user(name)["known"] for name in ("somebody", "nobody")] == [True, False]
    counts = [
        made.rank_after_log([RankRequest("u2", None, ["i7"])])[0].features["item_count"][0]
        for made in (other, ranker)
    ]
    assert counts[1] == counts[0] + 1


def test_a_new_users_events_are_read_for_nobody_else(ranker: Ranker) -> None:
    """An unknown user has no answers before and after the first new user's event: rate and count are of no rows."""
    unknown = RankRequest("nobody", None, ["i9"])
    (before,) = ranker.rank_after_log([unknown])
    ranker.observe([Event("a", "first", "i7", 0, 2000.0)], [])
    (after,) = ranker.rank_after_log([unknown])
    for name in ("user_count", "user_rate", "text_weight"):
        np.testing.assert_equal(after.features[name], before.features[name])


def test_a_deleted_user_is_unknown(
    ranker: Ranker, served_run: Path, tmp_path: Path
) -> None:
    """The log's rows and events, those that wait too: at once, after a restart, and until new events come.

    Other users' scores are those of a server that never read the events; an event alone leaves as well.
    """
    store = EventStore(f"sqlite:///{tmp_path}/events.db")
    store.put_items([{"item_id": "fresh", "title": "a dog in winter", "year": "2001"}])
    store.add([*EVENTS, Event("f", "u1", "wait", 1, 2003.0)])
    unknown = RankRequest("nobody", None, ["i3", "i7"])
    ranker.follow(store)
    store.add([Event("g", "u1", "a new text", 1, 2004.0)])
    ranker.follow(store, embed=False)
    ranker.rank_after_log(AFTER)
    assert (store.delete("u1"), store.delete(event_id="b")) == (5, 1)
    restarted = Ranker.load(served_run, audit_share=0.0)
    restarted.follow(store)
    for made in (ranker, ranker, restarted):
        made.follow(store, embed=False)
        assert (made.user("u1")["known"], made.user("u1")["history"]) == (False, [])
        assert "u1" not in made.about["examples"]["users"]
        assert [row["item_id"] for row in made.user("somebody")["history"]] == ["no title"]
        gone, nobody = made.rank_after_log([replace(unknown, user_id="u1"), unknown])
        np.testing.assert_allclose(gone.probabilities, nobody.probabilities, atol=1e-6)
        np.testing.assert_equal(gone.features, nobody.features)
        made.embed(["a new text"])
    others = [RankRequest(user, None, ["i1", "i7"]) for user in ("u2", "somebody")]
    found, expected = (made.rank_after_log(others) for made in (ranker, restarted))
    np.testing.assert_allclose(found[0].logits, expected[0].logits, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        for name, values in one.features.items():
            np.testing.assert_allclose(values, other.features[name], atol=1e-6)
    store.add([Event("c", "u1", "i2", 1, 2005.0)])
    ranker.follow(store)
    assert [row["item_id"] for row in ranker.user("u1")["history"]] == ["i2"]
    now, before = ranker.item("i2"), restarted.item("i2")
    assert now is not None
    assert before is not None
    assert (now["rows"], now["title"]) == (before["rows"] + 1, before["title"])


def test_a_correction_replaces_a_row(
    ranker: Ranker, served_run: Path, tmp_path: Path
) -> None:
    """Of the log or an event: two servers of one store read the new label alone, in history, counts and features."""
    store = EventStore(f"sqlite:///{tmp_path}/events.db")
    store.add([Event("b", "somebody", "i7", 0, 2001.0)])
    ranker.follow(store)
    history = ranker.user("u1")["history"]
    items = ["i7", "i7", *(row["item_id"] for row in history)]
    row = next(row for row in history if items.count(row["item_id"]) == 1)
    before = ranker.item(row["item_id"])
    assert before is not None
    turned = Event("x", "u1", row["item_id"], 1 - row["label"], row["time"])
    corrected = [turned, Event("y", "somebody", "i7", 1, 2002.0)]
    store.add(corrected, replacing={"x", "y"})
    restarted = Ranker.load(served_run, audit_share=0.0)
    for made in (ranker, restarted):
        made.follow(store)
        own = [r for r in made.user("u1")["history"] if r["item_id"] == row["item_id"]]
        assert own == [row | {"label": turned.label}]
        (answer,) = made.user("somebody")["history"]
        assert (answer["label"], answer["time"]) == (1, 2002.0)
        likes = before["likes"] + turned.label - row["label"]
        assert made.item(row["item_id"]) == before | {"likes": likes}
    asked = [RankRequest(user, None, ["i3", "i7"]) for user in ("u1", "u2", "somebody")]
    one, other = (made.rank_after_log(asked) for made in (ranker, restarted))
    for found, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        np.testing.assert_equal(found.features, expected.features)


def test_events_stand_in_prompts_as_the_walk_sees_them(ranker: Ranker) -> None:
    """A new user's events make the history that a request brings: the same segments but for the others' counts."""
    past = [(f"i{k % 20}", k % 2, 3000.0 + k) for k in range(8)]
    rows = [HistoryRow(*row) for row in past]
    (brought,) = ranker.rank_after_log([RankRequest(None, rows, ["i9"])])
    ranker.observe(
        [
            Event(str(k), "new", item, label, time)
            for k, (item, label, time) in enumerate(past)
        ],
        [],
    )
    (kept,) = ranker.rank_after_log([RankRequest("new", None, ["i9"])])
    own = (
        "user_rate",
        "user_count",
        "mf",
        "text",
        "text_weight",
        "item_similarity",
        "item_count",
    )
    for name in own:
        assert kept.features[name] == pytest.approx(
            brought.features[name], abs=1e-6, nan_ok=True
        )
    np.testing.assert_allclose(kept.probabilities, brought.probabilities, atol=1e-4)


def test_company_and_errors(ranker: Ranker) -> None:
    """An item of the same id in two requests is two items; a request that is none costs the others nothing."""
    same = [Item("new", "a dog at sea"), Item("new", "a river")]
    alone = [ranker.rank_after_log([RankRequest("u1", None, [item])])[0] for item in same]
    wrong = [
        RankRequest("u1", None, ["no such item"]),
        RankRequest(None, [HistoryRow("no such item", 1)], ["i1"]),
        RankRequest(None, [HistoryRow("i1", 1, rating=2.0)], ["i1"]),
        RankRequest("u1", None, [Item("new", "x", (("yaer", "1999"),))]),
        RankRequest("u1", None, [Item("new", "long " * 400)]),
        RankRequest(None, [HistoryRow(Item("new", "long " * 400), 1)], ["i1"]),
    ]
    found = ranker.rank_after_log(
        [*wrong, *(RankRequest("u1", None, [item]) for item in same)]
    )
    assert all(
        answer.error and np.isnan(answer.probabilities).all()
        for answer in found[: len(wrong)]
    )
    for answer, expected in zip(found[len(wrong) :], alone, strict=True):
        close(answer, expected)
    assert abs(alone[0].probabilities[0] - alone[1].probabilities[0]) > 1e-4


def test_full_depth_audits_and_deadlines(ranker: Ranker, served_run: Path) -> None:
    """An audit is what full depth says; behind a deadline a request is answered by the first head, and says so."""
    requests = [asked(record) for record in REQUESTS]
    audited = Ranker.load(served_run, audit_share=1.0).rank_after_log(requests)
    planned = ranker.rank_after_log(requests)
    ranker.full_depth = True
    full = ranker.rank_after_log(requests)
    for whole, plan, audit in zip(full, planned, audited, strict=True):
        assert set(whole.exit_layers) == {3}
        assert plan.audit is None
        assert plan.token_layers <= plan.full_depth_token_layers
        close(audit, plan)
        np.testing.assert_allclose(audit.audit, whole.probabilities, atol=1e-4)
    for ranker.full_depth in (False, True):
        late, other = ranker.rank_after_log([asked(REQUESTS[0], deadline=0.0), requests[1]])
        assert (late.late, set(late.exit_layers), other.late) == (True, {0}, False)
        close(other, (full if ranker.full_depth else planned)[1])


def test_an_exported_folder_scores_as_its_run(
    ranker: Ranker, served_run: Path, tmp_path: Path
) -> None:
    """Its config.yaml has names for the places of logs and model; without a score table nothing is audited."""
    folder = export(served_run, tmp_path / "exported")
    ServeSettings(folder).check()
    there, own = (
        yaml.safe_load((of / "config.yaml").read_text()) for of in (served_run, folder)
    )
    assert own["data"]["logs"]["init_args"]["items"] == "items.csv"
    own["data"]["logs"], own["model"]["backbone"] = (
        there["data"]["logs"],
        there["model"]["backbone"],
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(own))
    exported, requests = Ranker.load(folder), [asked(record) for record in REQUESTS]
    for found, expected in zip(
        exported.rank_after_log(requests), ranker.rank_after_log(requests), strict=True
    ):
        close(found, expected)
    assert exported.about | {"run": ""} == ranker.about | {"run": ""}
    assert exported.monitor.share == 0


def test_the_ranker_names_its_time(ranker: Ranker) -> None:
    """It reads all of the log, the rows that a backtest scores included: its name says so, a past time is an error."""
    (found,) = ranker.rank_after_log([RankRequest("u1", None, ["i1"], time=100.0)])
    assert found.error is not None
    assert "100" in found.error
    assert not hasattr(ranker, "rank")


def test_a_history_without_times_counts_in_its_order(ranker: Ranker) -> None:
    """Three rows, not in the order of the items' codes: as with times in this order, and not as in another."""
    order = [("i7", 1), ("i1", 0), ("i4", 1)]

    def score(rows: list[HistoryRow]) -> float:
        (found,) = ranker.rank_after_log([RankRequest(None, rows, ["i9"])])
        return float(found.probabilities[0])

    plain = score([HistoryRow(item, label) for item, label in order])
    timed = score(
        [HistoryRow(item, label, 1000.0 + k) for k, (item, label) in enumerate(order)]
    )
    other = score([HistoryRow(item, label) for item, label in order[::-1]])
    assert plain == pytest.approx(timed, abs=1e-6)
    text = RankRequest("nobody", [HistoryRow(item, label) for item, label in order], ["i9"])
    for _ in range(2):  # beside an unknown user_id it is read, and not kept
        (found,) = ranker.rank_after_log([text])
        assert found.cached is None
        assert found.probabilities[0] == pytest.approx(plain, abs=1e-6)
    assert abs(plain - other) > 1e-4


def test_new_texts_of_a_request_are_bounded(ranker: Ranker) -> None:
    """A request that brings more new text than allowed is an error, and costs the one beside it nothing."""
    ranker.max_new_characters = 100
    long = RankRequest(None, [], [Item(title=f"{k} {'x' * 30}") for k in range(4)])
    short = RankRequest(None, [], [Item(title="new")])
    (alone,) = ranker.rank_after_log([short])
    error, beside = ranker.rank_after_log([long, short])
    assert "128 characters of new items" in str(error.error)
    assert beside.logits.tolist() == pytest.approx(alone.logits.tolist(), abs=1e-5)


def test_known_items_never_wait_for_new_ones(ranker: Ranker, tmp_path: Path) -> None:
    """New items of the store, and a user's events from the first about one on, wait until texts are embedded.

    Events of other users are in histories at once; each user's keep their order, and nothing is embedded unasked.
    """
    store = EventStore(f"sqlite:///{tmp_path}/events.db")
    store.put_items([{"item_id": "n1", "title": "a dog at night", "year": "2001"}])
    about = [("u1", "i7"), ("u1", "n1"), ("u1", "i4"), ("u2", "i4"), ("u3", "n2")]
    store.add([Event(str(k), *names, 1, 5000.0 + k) for k, names in enumerate(about)])

    def latest(user: str, count: int) -> list[str]:
        return [row["item_id"] for row in ranker.user(user)["history"][-count:]]

    # 1. at once
    ranker.follow(store, embed=False)
    texts = ranker.waiting.texts
    assert list(texts.values()) == ["a dog at night, 2001", "n2"]
    assert ranker.waiting.characters == 22
    assert (latest("u1", 1), latest("u2", 1)) == (["i7"], ["i4"])
    (unknown,) = ranker.rank_after_log([RankRequest("u2", None, ["n1"])])
    assert "no title" in str(unknown.error)
    # 2. texts in their order
    ranker.embed(["a dog at night, 2001"])
    ranker.follow(store, embed=False)
    assert list(texts.values()) == ["n2"]
    assert latest("u1", 3) == ["i7", "n1", "i4"]
    ranker.embed(["n2"])
    ranker.follow(store, embed=False)
    assert (ranker.waiting.characters, latest("u3", 1)) == (0, ["n2"])
    # 3. vectors are those of a ranker that took all in at once
    (found,) = ranker.rank_after_log([RankRequest("nobody", None, ["n1", "n2"])])
    embed: Any = ranker._model.backbone.embed_tokens  # type: ignore[union-attr]
    start = ranker._codes["n1"]
    expected = ranker._text_vectors._reader.encode(["a dog at night, 2001", "n2"])  # type: ignore[union-attr]
    np.testing.assert_allclose(embed.items[start : start + 2], expected, atol=1e-5)
    assert found.error is None


def test_a_deadline_covers_new_texts(ranker: Ranker) -> None:
    """Behind its deadline nothing of a request is embedded: exit 0 answers, as it does for embedded texts."""
    request = RankRequest("u1", None, [Item(title="a dog in winter"), "i3"])
    wrong = replace(request, candidates=[Item(title="a river"), "no such item"])
    waits, error, late, beside = ranker.rank_after_log(
        [request, wrong, replace(request, deadline=0.0), asked(REQUESTS[3])], embed=False
    )
    assert (waits.waits_for, waits.error) == (["a dog in winter"], None)
    assert error.error is not None
    assert (late.late, set(late.exit_layers), beside.error) == (True, {0}, None)
    ranker.embed(["a dog in winter"])
    read, again = ranker.rank_after_log(
        [replace(request, deadline=0.0), request], embed=False
    )
    assert (again.error, again.waits_for) == (None, ())
    np.testing.assert_array_equal(late.logits, read.logits)
