"""The bodies that clients send and read: translated to one form of request and one of event, and back.

Cohere's rerank, which Gorse sends too, TEI's rerank, and our own, which says most. All become `Asked`;
the inference process, which knows users and titles, makes a `RankRequest` of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import polars as pl
from pydantic import (
    AfterValidator,
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from project.data.protocol import CLICKED, label_expression
from project.errors import DataError
from project.serve.request import Answered, Ranked, RankRequest
from project.serve.store import Event

if TYPE_CHECKING:  # the HTTP process needs no torch
    from project.serve.ranker import Ranker

AHEAD = 60.0  # seconds that the clock of a client may be fast


def _storable(text: str) -> str:
    if "\0" in text or (not text.isascii() and text != text.encode(errors="ignore").decode()):
        raise ValueError("it holds a NUL or half a surrogate pair, which databases refuse")
    return text


def _number_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


Text = Annotated[str, AfterValidator(_storable)]
Column = Annotated[Text, BeforeValidator(_number_as_text)]
Id = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=256),
    AfterValidator(_storable),
    BeforeValidator(_number_as_text),  # runs first
]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Answer = Literal[0, 1]


class Item(BaseModel, extra="allow"):
    """An item by id, by title, or a new one: further keys are columns of the items table, as text."""

    __pydantic_extra__: dict[str, Column] = Field(init=False)
    item_id: Id | None = None
    title: Text | None = None

    @model_validator(mode="after")
    def _named(self) -> Item:
        if not (self.item_id or (self.title or "").strip()):
            raise ValueError("an item needs an item_id or a title")
        return self

    def columns(self) -> dict[str, Any]:
        """What was given."""
        return self.model_dump(exclude_none=True)


class HistoryRow(Item):
    """An item that the user answered; without a time the order of the list counts."""

    label: Answer
    time: Finite | None = Field(None, ge=0, description="Seconds since 1970.")


class Document(Item):
    """An item whose title may be named `text`."""

    title: Text | None = Field(None, validation_alias=AliasChoices("title", "text"))


class Options(BaseModel):
    """Keys that every scoring request may have; Cohere's client sends them as `additional_body_parameters`."""

    deadline_ms: Finite | None = Field(None, gt=0, le=3_600_000, description="Then the deepest exit answers.")


class Queried(Options):
    """Keys beside a query: who asks and which items the texts are, where the client knows."""

    query: Text = Field(description="A user id, or else text that is shown as the history.")
    user_id: Id | None = None
    item_ids: list[Id] | None = Field(None, description="An id for each text.")

    def asked(self, texts: Sequence[str | Document]) -> Asked:
        """A text is an item id, a known title, or the title of a new item."""
        items = [{"title": given} if isinstance(given, str) else given.columns() for given in texts]
        if self.item_ids is not None:
            if len(self.item_ids) != len(items):
                raise DataError(
                    f"item_ids has {len(self.item_ids)} ids for {len(items)} texts; give one each."
                )
            items = [item | {"item_id": name} for item, name in zip(items, self.item_ids, strict=True)]
        return Asked(self.user_id, None, None if self.user_id else self.query, items, self.deadline_ms)


class RankBody(Options):
    """Score candidates for a user, or for somebody with a history of their own."""

    user_id: Id | None = None
    history: list[HistoryRow] | None = None
    candidates: list[Id | Item] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> RankBody:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("expected either user_id or history")
        return self

    def asked(self) -> Asked:
        """The same for the queue."""
        history = None if self.history is None else [row.columns() for row in self.history]
        items = [c if isinstance(c, str) else c.columns() for c in self.candidates]
        return Asked(self.user_id, history, None, items, self.deadline_ms)


class CohereBody(Queried):
    """Cohere's rerank, both versions; Gorse's LLM ranker sends it too."""

    documents: list[Text | Document] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class TeiBody(Queried):
    """Text Embeddings Inference's rerank."""

    texts: list[Text] = Field(min_length=1)
    raw_scores: bool = False
    return_text: bool = False


RerankBody = Annotated[
    Annotated[CohereBody, Tag("documents")] | Annotated[TeiBody, Tag("texts")],
    Discriminator(lambda body: "texts" if isinstance(body, dict) and "texts" in body else "documents"),
]
"""`/rerank` is Cohere's and TEI's; they differ in a key."""


# Answers


class Usage(BaseModel, from_attributes=True):
    """What the request cost, and what it would have cost at full depth."""

    token_layers: int
    full_depth_token_layers: int


class RankedItem(BaseModel):
    """A candidate: its place in the request, its score, the exit it left at, and the retrieved features behind it."""

    index: int
    item_id: str
    probability: float
    exit_layer: int
    why: dict[str, float]


class RankAnswer(BaseModel):
    """Candidates by probability, best first. `late`: the deadline cut it; `full_depth`: the drift alarm is on."""

    id: str
    model: str
    items: list[RankedItem]
    usage: Usage
    depth_saved: float = Field(description="Share of full depth's token-layers that was not run.")
    late: bool
    full_depth: bool


class CohereResult(BaseModel):
    """A document's place and score, and, where it is asked for, its text."""

    index: int
    relevance_score: float
    exit_layer: int
    document: dict[str, str] | None = None


class CohereAnswer(BaseModel):
    """Documents by score, best first."""

    id: str
    model: str
    results: list[CohereResult]
    usage: Usage


class TeiResult(BaseModel):
    """A text's place and score."""

    index: int
    score: float
    text: str | None = None


@dataclass(frozen=True)
class Asked:
    """A request on its way to the inference process. `query` is a user id or text where neither other one is given."""

    user_id: str | None
    history: list[dict[str, Any]] | None
    query: str | None
    candidates: Sequence[str | dict[str, Any]]
    deadline_ms: float | None

    def request(self, ranker: Ranker, arrived: float) -> RankRequest:
        """What the ranker is asked. An item without an id is the one of its title, else a new one of that name."""

        def item(given: str | dict[str, Any]) -> str | dict[str, Any]:
            if isinstance(given, str) or "item_id" in given:
                return given
            known = ranker.item_of_title(given["title"])
            return given | {"item_id": given["title"] if known is None else known}

        user, history, now = self.user_id, self.history, time.time()
        if self.query is not None and ranker.knows_user(self.query):
            user = self.query
        elif self.query is not None:
            history = [{"title": self.query, "label": 1}] if self.query.strip() else []
        rows = None if history is None else [{"time": now, **item(row)} for row in history]  # type: ignore[dict-item]
        deadline = None if self.deadline_ms is None else arrived + self.deadline_ms / 1000
        return RankRequest(user, rows, [item(c) for c in self.candidates], deadline)

    def texts(self) -> list[str]:
        """Every text of it whose length is limited."""
        items = [*self.candidates, *(self.history or ())]
        columns = [c for item in items for c in ([item] if isinstance(item, str) else item.values())]
        return [self.query or "", *(c for c in columns if isinstance(c, str))]


def best_first(ranked: Ranked, top_n: int | None = None) -> list[int]:
    """Places of the candidates by probability; ties in the order of the request."""
    order: list[int] = np.argsort(-ranked.probability, kind="stable").tolist()
    return order[:top_n]


def rank_answer(body: RankBody, found: Answered, name: str) -> RankAnswer:
    """Our own."""
    ranked, ids, why = found.ranked, found.items, found.ranked.features
    chance, layer = ranked.probability.tolist(), ranked.exit_layer.tolist()
    items = [
        RankedItem(index=k, item_id=ids[k], probability=chance[k], exit_layer=layer[k], why=why[k])
        for k in best_first(ranked, body.top_n)
    ]
    return RankAnswer(
        id=name,
        model=found.run,
        items=items,
        usage=Usage.model_validate(ranked),
        depth_saved=1 - ranked.token_layers / max(ranked.full_depth_token_layers, 1),
        late=ranked.late,
        full_depth=found.full_depth,
    )


def cohere_answer(body: CohereBody, found: Answered, name: str) -> CohereAnswer:
    """Cohere's, for both versions."""
    ranked, sent = found.ranked, [d if isinstance(d, str) else d.title or "" for d in body.documents]
    shown = [{"text": text} if body.return_documents else None for text in sent]
    chance, layer = ranked.probability.tolist(), ranked.exit_layer.tolist()
    results = [
        CohereResult(index=k, relevance_score=chance[k], exit_layer=layer[k], document=shown[k])
        for k in best_first(ranked, body.top_n)
    ]
    return CohereAnswer(id=name, model=found.run, results=results, usage=Usage.model_validate(ranked))


def tei_answer(body: TeiBody, ranked: Ranked) -> list[TeiResult]:
    """TEI's; raw scores are logits."""
    scores = ranked.probability.astype(np.float64)
    if body.raw_scores:
        inside = np.clip(scores, 1e-12, 1 - 1e-12)
        scores = np.log(inside / (1 - inside))
    texts = body.texts if body.return_text else [None] * len(body.texts)
    return [TeiResult(index=k, score=float(scores[k]), text=texts[k]) for k in best_first(ranked)]


# Events


class NewItem(Item):
    """An item that becomes known."""

    item_id: Id
    title: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_storable)]


class EventBody(Item):
    """An answer of a user. A title, and further columns, make an item known that was not."""

    event_id: Id
    user_id: Id
    item_id: Id
    rating: Finite | None = None
    label: Answer | None = None
    timestamp: Finite = Field(ge=0, description="Seconds since 1970.")


class GorseFeedback(BaseModel):
    """Gorse's feedback: of a type that means yes, or with a value above 0, which is a rating."""

    FeedbackType: Id
    UserId: Id
    ItemId: Id
    Value: Finite | None = None
    Timestamp: AwareDatetime | Literal[""] | None = None

    def event(self) -> EventBody:
        """The same as ours; type, user, item and time name it, as in Gorse."""
        named = "\0".join(map(str, (self.FeedbackType, self.UserId, self.ItemId, self.Timestamp or "")))
        return EventBody(
            event_id=f"gorse-{hashlib.sha256(named.encode()).hexdigest()[:32]}",
            user_id=self.UserId,
            item_id=self.ItemId,
            timestamp=_seconds(self.Timestamp),
            **({"rating": self.Value} if self.Value else {"label": 1}),
        )


def _seconds(value: datetime | float | str | None) -> float:
    """Seconds since 1970; now where there is none, and for Gorse's year 1, which is none."""
    at = value.timestamp() if isinstance(value, datetime) else value
    return time.time() if at is None or isinstance(at, str) or at < 0 else at


def labelled(events: Sequence[EventBody], rule: str | None) -> list[Event]:
    """Events with the label that the run's protocol gives them; a label of their own comes first."""
    latest = time.time() + AHEAD
    for k, event in enumerate(events):
        where = f"event {k} ({event.event_id!r})"
        if event.timestamp > latest:
            raise DataError(f"{where} is dated {event.timestamp:.0f}, after now; give seconds since 1970.")
        if event.label is None and event.rating is None and rule != CLICKED:
            raise DataError(f"{where} has neither rating nor label; give one.")
        if event.label is None and rule is None:
            raise DataError(f"{where} has a rating, but this run's log has labels 0 and 1; give a label.")
    ratings = pl.DataFrame(
        {"rating": [e.rating for e in events], "label": [e.label for e in events]},
        schema={"rating": pl.Float64, "label": pl.Int8},
    )
    labels = ratings.select(pl.coalesce("label", label_expression(rule))).to_series()
    return [
        Event(e.event_id, e.user_id, e.item_id, int(label), e.timestamp)
        for e, label in zip(events, labels, strict=True)
    ]


def new_items(events: Sequence[EventBody]) -> list[dict[str, str]]:
    """Items that events bring a title of."""
    own = {"event_id", "user_id", "rating", "label", "timestamp"}
    return [e.model_dump(exclude=own, exclude_none=True) for e in events if e.title]
