"""Ranks candidates for requests as of now: the index, prompts and the engine of `predict`, kept up to date by events.

A user's history in a prompt is the log's rows, then events, each with the retrieved features it had when it came. A
history that a request brings is read as if it came just now, in its own order of time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from project.arrays import I64
from project.data.download import SOURCES
from project.data.filters import check_columns, passing, spread
from project.data.prompt import PromptEncoder
from project.data.protocol import answered
from project.data.ragged import Ragged
from project.data.requests import Catalogue, titles_of
from project.data.stream import streams_of
from project.engine.cache import StreamCache
from project.engine.decisions import ListExits, RowExits, nobody_leaves
from project.engine.engine import Engine
from project.engine.predict import Run
from project.engine.prepacked import prepacked
from project.engine.requests import (
    PreparedRequest,
    StreamTokens,
    criteria_and_exit_0,
    shared_prefix,
    until_slots,
)
from project.errors import ConfigError, DataError, ProjectError
from project.features import COLUMNS, Retrieved
from project.loading import open_run
from project.request import Item, RankRequest, RecommendRequest, Scored, id_of
from project.retrieval.online import in_time
from project.retrieval.text import TextVectors, item_text
from project.run import read_seen
from project.serve.drift import Monitor, reference_loss
from project.serve.store import Arrived, Deleted, Event, EventStore
from project.serve.waiting import Waiting

EXAMPLES = 12
ROOM = 256  # items more than are known, before room for vectors of twice as many is made


class Ranker:
    """A run, ready to rank. One thread at a time."""

    full_depth = False  # set by the drift alarm: nobody leaves early
    # of the new items of a request, whose texts are embedded
    max_new_characters: float = float("inf")

    def __init__(self, folder: Path, run: Run, cache_mib: int, audit_share: float) -> None:
        model = run.model
        data = run.data
        plan = run.plan
        assert model.backbone is not None
        self._model = model
        self._data = data
        # 1. users and items, and what the log knows of them
        split = data.split
        if split.protocol.answer_delay:
            raise ConfigError(
                f"data.protocol.answer_delay is {split.protocol.answer_delay:g}, but a server reads events as they "
                "come. Expected 0: fit a run without it to serve; predict, test and benchmark know delays."
            )
        log = split.interactions
        self._items = log.items
        self._encoder = data.encoder
        # by item id
        self._codes: dict[str, int] = dict(log.items.select("item_id", "item").iter_rows())
        self._titles = titles_of(log.items)  # item id by title
        # by user id
        self._users: dict[str, int] = dict(log.users.select("user_id", "user").iter_rows())
        self._index = data.features.index()
        # codes of users that the log does not have; the guest's stands for all who are unknown
        self._new_codes = count(self._index.guest + 1)
        self._rates = data.rates
        self._finder = data.candidate_finder()
        rows = split.rows.filter(answered(split.rows)).select(
            "user", "item", "row_id", "timestamp", "label", "rating"
        )
        rows = rows.join(data.retrieved["test"], on="row_id", maintain_order="left")
        self._log = rows.sort("user", "row_id")
        # (users + 1,) where each user's rows start
        self._of_user = np.searchsorted(
            self._log["user"].to_numpy(), np.arange(log.users.height + 1)
        )
        # of users that were asked for, or have events
        self._histories: dict[int, History] = {}
        # of the store, up to which it was read, or is in the log
        self.seq: int = read_seen(folder).get("seq", 0)
        self._rule = log.rule  # makes ratings labels
        self.waiting = Waiting()
        # 2. the model
        self._baseline = model.feature_baseline()
        model.know(data)
        self._text_vectors = TextVectors(data.item_encoder()) if model.items else None
        device = model.backbone.embed_tokens.weight.device
        reference = reference_loss(folder, model, data, plan)
        # once for all engines
        model.backbone = prepacked(model.backbone.eval(), model.in_bfloat16)
        # the plan, full depth and audits share users' cached histories
        self._cache = cache = StreamCache(cache_mib)
        self._engine = Engine(model, ListExits(plan, run.lists, device), cache)
        self._whole = Engine(model, RowExits(nobody_leaves(plan), device), cache)
        self.monitor = Monitor(
            model,
            plan,
            run.lists,
            reference or 0.0,
            cache,
            # without a score table of this checkpoint nobody knows which loss is no drift
            0.0 if reference is None else audit_share,
        )
        # 3. what it is
        base = model.backbone_name
        self.about: dict[str, Any] = {
            "run": str(folder),
            "protocol": split.hash,
            "exit_layers": list(plan.layers),
            "certificate": run.certificate,
            "examples": {  # for the page
                "users": log.users["user_id"].tail(EXAMPLES).reverse().to_list(),
                "items": log.items["title"].head(EXAMPLES).to_list(),
            },
            "item_columns": self._catalogue().columns,
            "columns": dict(log.columns),  # context and users' attributes, with kinds
            "model": base,
            "licence": SOURCES[base].licence
            if base in SOURCES
            else f"See the licence of {Path(base).name}.",
        }

    @classmethod
    def load(cls, run: Path, cache_mib: int = 256, audit_share: float = 0.01) -> Ranker:
        """From a calibrated run's folder, or one that `export` wrote, which has no score table to audit by.

        `cache_mib` is memory for users' histories, `audit_share` of the requests also run to full depth.
        """
        return cls(run, open_run(run), cache_mib, audit_share)

    # Events

    def follow(self, store: EventStore, embed: bool = True) -> None:
        """Observe what came to a store since the last call.

        Without `embed` a new item waits until its text is embedded, and a user's events from the first about it on.
        Other events overtake these, which then read as events that came late.
        """
        if embed:
            self.embed(list(self.waiting.texts.values()))
        self.seq, arrived = store.arrivals(self.seq)
        self._take_in(arrived, embed)

    def embed(self, texts: Sequence[str]) -> None:
        """Embed texts, and observe what waited for them."""
        if self._text_vectors is not None and texts:
            self._text_vectors.of(texts)
        self._take_in(self.waiting.release(texts), embed=False)

    def _take_in(self, arrived: Sequence[Arrived], embed: bool) -> None:
        """Observe what came to the store, or have it wait."""
        # by id, not observed yet: those in a row are embedded together
        items = dict[str, Mapping[str, str]]()
        for what in arrived:
            # 0. rows that leave, or a user, whose attributes later events read
            if isinstance(what, Deleted):
                self._forget(what)
                # events that wait leave as soon as they come
                self.waiting.hold(what, "")
                continue
            if not isinstance(what, Event) and "user_id" in what:
                self._rates.put_user(what["user_id"], what)
                continue
            item = named_by(what) if isinstance(what, Event) else what
            item_id = item["item_id"]
            # 1. a new item, whose text the first that names it says
            known = any(item_id in of for of in (self._codes, items, self.waiting.texts))
            if not (embed or known):
                (row,) = self._catalogue_with([item]).added
                text = item_text(row)
                if self._absent([text]):
                    self.waiting.add(item_id, text)
            # 2. what waits, and what is observed
            if self.waiting.hold(what, item_id):
                continue
            if isinstance(what, Event):
                self.observe([what], items.values())
                items = {}
            else:
                items.setdefault(item_id, what)
        self.observe([], items.values())

    def _forget(self, gone: Deleted) -> None:
        """Drop deleted rows. A user without any is unknown from then on."""
        if gone.item_id is None:
            self._rates.forget_user(gone.user_id)
        if gone.user_id not in self._users:
            return
        user = self._users[gone.user_id]
        history = self._history(user)
        ids = self._items["item_id"]
        places = [
            k for k, (i, y, t) in enumerate(history.rows) if gone.covers(ids[i], y, t)
        ]
        if places:
            self._index.remove(user, places)
            self._finder.forget(user, [history.rows[place] for place in places])
            history.drop(places)
        if not history.rows:
            examples = self.about["examples"]["users"]
            if gone.user_id in examples:
                examples.remove(gone.user_id)
            del self._users[gone.user_id]
            del self._histories[user]
        # keys and values of the tokens that are gone
        self._cache.take(gone.user_id, 0)

    def _absent(self, texts: Iterable[str]) -> list[str]:
        return [] if self._text_vectors is None else self._text_vectors.absent(texts)

    def observe(self, events: Iterable[Event], items: Iterable[Mapping[str, Any]]) -> None:
        """Take in items, then events, in the order in which they came. An item that is known stays as it is."""
        self._learn(items)
        for event in events:
            # 1. who and what it is about; either may be new
            self._learn([named_by(event)])
            if event.user_id not in self._users:
                self._users[event.user_id] = next(self._new_codes)
            user = self._users[event.user_id]
            item = self._codes[event.item_id]
            code = np.array([item])
            # 2. the features it has now, for its prompt
            features = self._index.retrieved(user, [item], None, self._items)
            time = max(event.timestamp, self._index.latest)
            values = self._rates.of_event(event.user_id, json.loads(event.context or "{}"))
            rating = np.array([event.rating], np.float64)  # None is NaN
            label = np.array([event.label], np.int8)
            segments = self._encoder.encode(code, features, label, rating)
            # 3. what later requests read
            self._history(user).add(
                segments.tokens.values, item, event.label, time, event.timestamp
            )
            self._index.observe(
                user, item, event.label, time, float(rating[0]), self._items
            )
            self._rates.observe(values, code, event.label, self._items)
            self._finder.observe(item, event.label, event.timestamp)

    def _learn(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Give items that are new codes, texts and vectors."""
        catalogue = self._catalogue_with(items)
        self._items, self._encoder = self._with(catalogue)
        self._codes |= catalogue.codes.maps[0]
        for row in catalogue.added:
            self._titles.setdefault(row["title"], row["item_id"])

    def _catalogue(self) -> Catalogue:
        return Catalogue(self._items, self._codes, self._titles)

    def _catalogue_with(self, items: Iterable[Mapping[str, Any]]) -> Catalogue:
        """The catalogue and items. Columns that this run's items have not are not read."""
        catalogue = self._catalogue()
        for item in items:
            columns = tuple(
                (name, item[name]) for name in catalogue.columns if item.get(name)
            )
            catalogue.add(Item(item["item_id"], item["title"], columns))
        return catalogue

    def _with(
        self, catalogue: Catalogue, unread: AbstractSet[int] = frozenset()
    ) -> tuple[pl.DataFrame, PromptEncoder]:
        """The items table and the encoder of prompts, with the items that a catalogue adds.

        Those at places `unread` get no vector.
        """
        if not catalogue.added:
            return self._items, self._encoder
        items = catalogue.table()
        if self._text_vectors is not None:
            self._know_vectors(catalogue.added, unread)
        return items, self._encoder.with_items(items[self._items.height :])

    @torch.inference_mode()
    def _know_vectors(
        self, new: Sequence[Mapping[str, Any]], unread: AbstractSet[int]
    ) -> None:
        """Give the backbone vectors of new items, whose codes follow the known ones, but for places `unread`."""
        embed: Any = self._model.backbone.embed_tokens  # type: ignore[union-attr]
        stop = self._items.height + len(new)
        if stop > len(embed.items):
            more = embed.items.new_zeros(max(ROOM, stop), embed.items.shape[1])
            embed.know(torch.cat([embed.items, more]))
        read = [row for k, row in enumerate(new) if k not in unread]
        if read:
            vectors = self._text_vectors.of([item_text(row) for row in read])  # type: ignore[union-attr]
            embed.items[[row["item"] for row in read]] = torch.from_numpy(vectors).to(
                embed.items
            )

    # Who and what is known

    def user(self, user_id: str) -> dict[str, Any]:
        """Whether the log or an event has a user, the history (the log's rows, then events), and attributes."""
        known = user_id in self._users
        rows = self._history(self._users[user_id]).rows if known else []
        ids = self._items["item_id"]
        titles = self._items["title"]
        history = [
            {"item_id": ids[code], "title": titles[code], "label": label, "time": seconds}
            for code, label, seconds in rows
        ]
        return {
            "known": known,
            "history": history,
            "attributes": self._rates.shown(user_id),
        }

    def item(self, item_id: str) -> dict[str, Any] | None:
        """A known item: title and other columns, likes and rows as of now."""
        if item_id not in self._codes:
            return None
        row = self._items.row(self._codes[item_id], named=True)
        likes, rows = self._index.counts(row.pop("item"))
        return row | {"likes": likes, "rows": rows}

    def _history(self, user: int) -> History:
        if user not in self._histories:
            found = self._histories[user] = History()
            if user < len(self._of_user) - 1:
                rows = self._log[self._of_user[user] : self._of_user[user + 1]]
                none = np.zeros(len(rows), dtype=bool)
                streams = streams_of(rows, none, ~none, self._encoder)
                # behind these are instructions
                found.tokens = [streams.tokens[k] for k in range(len(streams.row_id))]
                found.times = streams.timestamp.tolist()
                found.rows = list(rows.select("item", "label", "timestamp").iter_rows())
        return self._histories[user]

    # Requests

    @torch.inference_mode()
    def rank_after_log(
        self, requests: Sequence[RankRequest], embed: bool = True
    ) -> list[Scored]:
        """Scores as of now, after all of the log and all events, in the order of the requests.

        Without `embed` a request whose new items' texts are not embedded yet is not scored, but says which these are.

        A user of the log is scored with all of their rows, also on items among them: this measures nothing on the log.
        An error of one request does not touch the others.
        """
        self.full_depth |= self.monitor.alarm
        found = dict[int, Scored]()  # by place among the requests
        # 1. Items that requests bring have codes behind the known ones until the batch is
        # done.
        catalogue = self._catalogue()
        resolved = dict[int, tuple[RankRequest, Catalogue]]()  # by place
        # new items of requests whose deadline has passed: exit 0 answers and reads no vector
        unread = set[int]()
        has_exit_0 = self._engine.decision.layers[0] == 0
        now = time.monotonic()
        for place, request in enumerate(requests):
            own = catalogue.alone()
            before = len(catalogue.added)
            late = request.deadline is not None and request.deadline < now
            try:
                asked = own.resolve(request, self._rule)
                if isinstance(asked, RecommendRequest):
                    asked = self._with_candidates(asked, own.codes)
                texts = self._new_texts(catalogue.added[before:])
                missing = [] if embed or late else self._absent(texts)
                if not asked.candidates:  # nothing may be listed
                    found[place] = Scored.failed(asked, None)
                elif not missing:
                    resolved[place] = asked, own
                    if late and has_exit_0:
                        unread.update(range(before, len(catalogue.added)))
                    continue
                else:
                    found[place] = replace(Scored.failed(request, None), waits_for=missing)
            except ProjectError as error:
                found[place] = Scored.failed(request, str(error))
            # or they would be embedded with the others' items
            del catalogue.added[before:]
        items, encoder = self._with(catalogue, unread)
        # 2. Histories, features and prompts.
        prepared = dict[int, PreparedRequest]()
        features = dict[int, Retrieved]()  # of the candidates
        for place, (request, own) in resolved.items():
            try:
                prepared[place], features[place] = self._prepare(
                    request, own.codes, items, encoder
                )
            except ProjectError as error:
                found[place] = Scored.failed(request, str(error))
        # 3. Which requests run to full depth after an alarm, and which are audited.
        by_plan = list[int]()
        whole = list[int]()
        audited = list[int]()
        for place, made in prepared.items():
            if self.full_depth or (self.monitor.lists.alarm and made.list_of):
                whole.append(place)
            elif self.monitor.draws():
                audited.append(place)
            else:
                by_plan.append(place)
        # 4. Scores.
        scored = {place: self.monitor.audit(prepared[place]) for place in audited}
        for engine, places in ((self._engine, by_plan), (self._whole, whole)):
            of_these = engine.score([prepared[place] for place in places])
            scored.update(zip(places, of_these, strict=True))
        # 5. Responses.
        titles = items["title"]
        for place in prepared:
            request, own = resolved[place]
            item_ids = [id_of(item) for item in request.candidates]
            columns = features[place].columns
            found[place] = replace(
                scored[place],
                item_ids=item_ids,
                titles=titles.gather(
                    [own.codes[item_id] for item_id in item_ids]
                ).to_list(),
                features={name: columns[name] for name in COLUMNS if name in columns},
                full_depth=place in whole,
            )
            if isinstance(request, RecommendRequest):
                found[place] = self._listed(request, found[place])
        return [found[place] for place in range(len(requests))]

    def _with_candidates(
        self, request: RecommendRequest, codes: Mapping[str, int]
    ) -> RecommendRequest:
        """The request with candidates, their sources, of the items that are known here and may be listed."""
        # 1. what the user answered
        if request.history is None or request.user_id in self._users:
            user = self._users.get(request.user_id or "", self._index.guest)
            past = [row[:2] for row in self._history(user).rows]
        else:
            past = [(codes[id_of(r.item)], r.label or 0) for r in request.history]
        # (m,) items, but for new ones that the request brings, and labels
        rows = np.array(past, np.int64).reshape(-1, 2)
        items, labels = rows[rows[:, 0] < self._items.height].T
        # 2. what may be listed: it has room in a prompt, and passes what is asked
        allowed = self._encoder.least_lengths() <= self._data.context_tokens
        allowed &= passing(self._items, request.filter)
        check_columns(self._items, request.at_most, "at_most")
        ids = self._items["item_id"]
        if request.allow is not None:
            allowed &= ids.is_in(request.allow).to_numpy()
        allowed &= ~ids.is_in(request.deny).to_numpy()
        if not request.include_answered:
            allowed[items] = False
        # 3. the best of it
        by_text = self._index.text_products(items[labels == 1], self._items)
        found = self._finder.find(items, labels, allowed, by_text)
        return replace(
            request,
            candidates=ids.gather(list(found)).to_list(),
            sources=list(found.values()),
            # margins of lists know probabilities alone
            exhaustive=request.exhaustive or self._finder.settings.popularity > 0,
        )

    def _listed(self, request: RecommendRequest, found: Scored) -> Scored:
        """Scores of a recommendation with its list."""
        codes = np.array([self._codes[item_id] for item_id in found.item_ids], np.int64)
        order = found.best_first()
        if not found.list_of:
            chances = found.probabilities * self._finder.weights(codes)
            order = np.argsort(-chances, kind="stable").tolist()
        listed = spread(order, self._items[codes], request.at_most)[: request.top_n]
        return replace(found, sources=request.sources, listed=listed)

    def _new_texts(self, items: Sequence[Mapping[str, Any]]) -> list[str]:
        """Texts of a request's new items; `DataError` where they are more than may be embedded for it."""
        texts = [item_text(item) for item in items]
        characters = sum(map(len, texts))
        if characters > self.max_new_characters:
            raise DataError(
                f"the request brings {characters:,} characters of new items; this server takes "
                f"{self.max_new_characters:,} (--max_new_characters). Send fewer new items, or make them known first."
            )
        return texts

    def _prepare(
        self,
        request: RankRequest,
        codes: Mapping[str, int],
        items: pl.DataFrame,
        encoder: PromptEncoder,
    ) -> tuple[PreparedRequest, Retrieved]:
        """The request, whose items are ids, for the engine; and retrieved features of its candidates."""
        limit = self._data.context_tokens
        now = request.asked_at(self._index.latest)
        candidates = np.array([codes[id_of(item)] for item in request.candidates])  # (n,)
        known = request.user_id in self._users
        if known or request.history is None:
            # 1. the history of a user: the log's rows and events; somebody unknown has none
            user = self._users.get(request.user_id or "", self._index.guest)
            history = self._history(user)
            found = self._index.retrieved(user, candidates, None, items, now)
            longest = 0  # what the log has was checked
        else:
            # 2. a history of its own, whose rows are answered with the candidates
            user = self._index.guest
            history = History()
            past = in_time(
                [(codes[item], y, at, rating) for item, y, at, rating in request.past(now)]
            )
            found = self._index.retrieved(user, candidates, past, items, now)
            item, label = np.array([row[:2] for row in past], np.int64).reshape(-1, 2).T
            tokens = encoder.encode(
                item,
                found.rows(slice(0, len(past))),
                label.astype(np.int8),
                np.array([row[3] for row in past], np.float64),
            ).tokens
            for k, (code, y, at, _) in enumerate(past):
                history.add(tokens[k], code, y, at, at)
            found = found.rows(slice(len(past), None))
            longest = int(tokens.lengths.max(initial=0))
        # 3. candidates' values of context and rates of these; they see the history and not
        # each other
        latest = np.full(len(candidates), np.inf)
        values = self._rates.values(request)
        context = self._rates.of_requests(values, candidates, latest, items)
        found = replace(found, columns=found.columns | context)
        segments = encoder.encode(candidates, found, np.full(len(candidates), -1, np.int8))
        instruction = encoder.instruction
        long = len(instruction) + max(longest, int(segments.tokens.lengths.max()))
        if long > limit:
            raise DataError(
                f"the prompt of an item alone has {long:,} tokens, but data.context_tokens is {limit:,}. Give it a "
                "shorter title."
            )
        numbers, exit_0 = criteria_and_exit_0(self._baseline, found)
        return PreparedRequest(
            request.request_id,
            history.prefix(instruction, limit),
            until_slots(segments.tokens, segments.slots),
            exit_0,
            numbers,
            # a history that a request brings is not kept
            request.user_id if known else None,
            np.inf if request.deadline is None else request.deadline,
            request.list_of,
        ), found


class History:
    """A user's history: a segment a row in order of time, each encoded once, and the prefix that they make."""

    def __init__(self) -> None:
        self.tokens = list[I64]()  # of each segment
        self.times = list[float]()  # seconds as which segments read
        # item, label, seconds by which the row is dated
        self.rows = list[tuple[int, int, float]]()
        self._prefix: StreamTokens | None = None

    def add(self, tokens: I64, item: int, label: int, time: float, dated: float) -> None:
        """Append a row that reads as if at `time`, which is not before the latest, and is dated otherwise."""
        self.tokens.append(tokens)
        self.times.append(time)
        self.rows.append((item, label, dated))
        self._prefix = None

    def drop(self, places: Sequence[int]) -> None:
        """Take out the rows at these places."""
        for rows in (self.tokens, self.times, self.rows):
            for place in reversed(places):
                del rows[place]
        self._prefix = None

    def prefix(self, instruction: I64, context_tokens: int) -> StreamTokens:
        """The tokens that all candidates see."""
        made = self._prefix
        if made is None or not np.array_equal(made.tokens[: len(instruction)], instruction):
            lists = Ragged.of([part.tolist() for part in self.tokens])
            made = self._prefix = shared_prefix(
                instruction, lists, np.array(self.times), context_tokens
            )
        return made


def named_by(event: Event) -> dict[str, str]:
    """The item of an event; where it is new, all that is known of it."""
    return {"item_id": event.item_id, "title": event.item_id}
