"""The bodies that clients send and read: translated to one form of request and one of event, and back.

Cohere's rerank, which Gorse sends too, TEI's rerank, SGLang's score, and our own, which says most. All become `Asked`;
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
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from project.data.protocol import CLICKED, label_expression
from project.errors import DataError
from project.serve.request import Ranked, RankRequest
from project.serve.store import Event

if TYPE_CHECKING:  # the HTTP process needs no torch
    from project.serve.ranker import Ranker

AHEAD = 60.0  # seconds that the clock of a client may be fast


def _storable(text: str) -> str:
    if "\0" in text or (not text.isascii() and text != text.encode(errors="ignore").decode()):
        raise ValueError("it holds a NUL or half a surrogate pair, which databases refuse")
    return text


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return _storable(text).strip()


def _number_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


Text = Annotated[str, AfterValidator(_storable)]
Column = Annotated[Text, BeforeValidator(_number_as_text)]
Id = Annotated[
    str,
    BeforeValidator(_number_as_text),
    StringConstraints(min_length=1, max_length=256),
    AfterValidator(_name),
]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Answer = Literal[0, 1]


class Item(BaseModel):
    """An item by id, by title, or a new one: further keys are columns of the items table, as text."""

    model_config = ConfigDict(extra="allow")
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
    """An item that the user answered."""

    label: Answer
    time: Finite | None = Field(
        None, ge=0, description="Seconds since 1970; the order of the list without it."
    )


class Options(BaseModel):
    """Keys that every scoring request may have; Cohere's client sends them as `additional_body_parameters`."""

    deadline_ms: Finite | None = Field(
        None, gt=0, le=3_600_000, description="Answer from the deepest exit that is reached by then."
    )


class Queried(Options):
    """Keys beside a query: who asks and which items the texts are, where the client knows."""

    query: Text = Field(description="A user id, or else text that is shown as the history.")
    user_id: Id | None = None
    item_ids: list[Id] | None = Field(None, description="An id for each document.")

    def asked(self, documents: Sequence[str | dict[str, str]]) -> Asked:
        """A document is an item id, a known title, or text of a new item."""
        items = [{"title": d} if isinstance(d, str) else _document(d) for d in documents]
        if self.item_ids is not None:
            if len(self.item_ids) != len(items):
                raise DataError(
                    f"item_ids has {len(self.item_ids)} ids for {len(items)} documents; give one each."
                )
            items = [item | {"item_id": name} for item, name in zip(items, self.item_ids, strict=True)]
        return Asked(self.user_id, None, None if self.user_id else self.query, items, self.deadline_ms)


def _document(columns: dict[str, str]) -> dict[str, str]:
    text = columns.get("title") or columns.get("text")
    if not text:
        raise DataError(f"a document has the keys {sorted(columns)}; expected text, or a title.")
    return {key: value for key, value in columns.items() if key != "text"} | {"title": text}


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

    documents: list[Text | dict[str, Text]] = Field(min_length=1)
    model: str = ""
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False


class TeiBody(Queried):
    """Text Embeddings Inference's rerank."""

    texts: list[Text] = Field(min_length=1)
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None


class ScoreBody(Options):
    """SGLang's score. Token ids are those of another tokenizer, so texts alone are read."""

    query: Text
    items: Text | list[Text]
    label_token_ids: list[int] | None = None
    apply_softmax: bool = False
    item_first: bool = False
    model: str = ""

    def asked(self) -> Asked:
        """The same for the queue."""
        items = [self.items] if isinstance(self.items, str) else self.items
        if not items:
            raise DataError("items is empty; expected at least one text.")
        return Asked(None, None, self.query, [{"title": text} for text in items], self.deadline_ms)


RerankBody = Annotated[
    Annotated[CohereBody, Tag("documents")] | Annotated[TeiBody, Tag("texts")],
    Discriminator(lambda body: "texts" if isinstance(body, dict) and "texts" in body else "documents"),
]
"""`/rerank` is Cohere's and TEI's; they differ in a key."""


# Answers


class Usage(BaseModel):
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


class CohereDocument(BaseModel):
    """A document as it was sent."""

    text: str


class CohereResult(BaseModel):
    """A document's place and score."""

    index: int
    relevance_score: float
    exit_layer: int
    document: CohereDocument | None = None


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


class ScoreAnswer(BaseModel):
    """One probability an item, in the order of the items."""

    scores: list[list[float]]
    model: str
    usage: Usage
    object: Literal["scoring"] = "scoring"


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


def usage(ranked: Ranked) -> Usage:
    """Its cost."""
    return Usage(token_layers=ranked.token_layers, full_depth_token_layers=ranked.full_depth_token_layers)


def rank_answer(names: Sequence[str], ranked: Ranked, top_n: int | None, about: dict[str, Any]) -> RankAnswer:
    """Our own."""
    items = [
        RankedItem(
            index=k,
            item_id=names[k],
            probability=float(ranked.probability[k]),
            exit_layer=int(ranked.exit_layer[k]),
            why=ranked.features[k],
        )
        for k in best_first(ranked, top_n)
    ]
    saved = 1 - ranked.token_layers / max(ranked.full_depth_token_layers, 1)
    return RankAnswer(items=items, usage=usage(ranked), depth_saved=saved, late=ranked.late, **about)


def cohere_answer(body: CohereBody, ranked: Ranked, about: dict[str, Any]) -> CohereAnswer:
    """Cohere's, for both versions."""

    def document(k: int) -> CohereDocument | None:
        sent = body.documents[k]
        text = sent if isinstance(sent, str) else sent.get("text", sent.get("title", ""))
        return CohereDocument(text=text) if body.return_documents else None

    results = [
        CohereResult(
            index=k,
            relevance_score=float(ranked.probability[k]),
            exit_layer=int(ranked.exit_layer[k]),
            document=document(k),
        )
        for k in best_first(ranked, body.top_n)
    ]
    return CohereAnswer(id=about["id"], model=about["model"], results=results, usage=usage(ranked))


def tei_answer(body: TeiBody, ranked: Ranked) -> list[TeiResult]:
    """TEI's; raw scores are logits."""
    scores = ranked.probability.astype(np.float64)
    if body.raw_scores:
        inside = np.clip(scores, 1e-12, 1 - 1e-12)
        scores = np.log(inside / (1 - inside))
    texts = body.texts if body.return_text else [None] * len(body.texts)
    return [TeiResult(index=k, score=float(scores[k]), text=texts[k]) for k in best_first(ranked)]


def score_answer(ranked: Ranked, about: dict[str, Any]) -> ScoreAnswer:
    """SGLang's, with the one label that is asked here: yes."""
    scores = [[float(p)] for p in ranked.probability]
    return ScoreAnswer(scores=scores, model=about["model"], usage=usage(ranked))


# Events


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
        at = _seconds(self.Timestamp)
        key = "\0".join((self.FeedbackType, self.UserId, self.ItemId, str(self.Timestamp or "")))
        return EventBody(
            event_id=f"gorse-{hashlib.sha256(key.encode()).hexdigest()[:32]}",
            user_id=self.UserId,
            item_id=self.ItemId,
            timestamp=at,
            **({"rating": self.Value} if self.Value else {"label": 1}),
        )


class PersonalizeEvent(BaseModel):
    """An event of AWS Personalize; without a value it means yes."""

    eventId: Id | None = None
    eventType: Id
    itemId: Id
    eventValue: Finite | None = None
    sentAt: AwareDatetime | Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PersonalizeBody(BaseModel):
    """The body of AWS Personalize's PutEvents."""

    trackingId: str = ""
    userId: Id
    sessionId: Text = ""
    eventList: list[PersonalizeEvent] = Field(min_length=1)

    def events(self) -> list[EventBody]:
        """The same as ours; without an eventId session, type, item and time name an event."""
        found = []
        for event in self.eventList:
            at = _seconds(event.sentAt)
            key = "\0".join((self.sessionId, self.userId, event.eventType, event.itemId, str(at)))
            name = event.eventId or f"personalize-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
            answer = {"label": 1} if event.eventValue is None else {"rating": event.eventValue}
            found.append(
                EventBody(event_id=name, user_id=self.userId, item_id=event.itemId, timestamp=at, **answer)
            )
        return found


class Kept(BaseModel):
    """How many were new; `RowAffected` is Gorse's name for it."""

    new: int
    RowAffected: int


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
            raise DataError(
                f"{where} is dated {event.timestamp:.0f}, after now; expected seconds since 1970."
            )
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
