"""The bodies that clients send and read: translated to one form of request and one of event, and back.

Cohere's rerank, which Gorse sends too, TEI's rerank, and our own, which says most. All become a `RankRequest`, whose
users and titles the inference process knows. Our own bodies may have no key that is unknown; other people's may.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import datetime
from operator import eq, ge, gt, le, lt
from typing import Annotated, Any, Literal, Self, TypeVar

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
from pydantic_core import PydanticCustomError

from project.data.protocol import label_of
from project.errors import DataError
from project.request import (
    HistoryRow,
    Item,
    RankRequest,
    RecommendRequest,
    Scored,
    check_names,
    text_of,
)
from project.serve.settings import ServeSettings
from project.serve.store import AHEAD, Event

# on the value of Gorse's feedback
CONDITIONS = {">": gt, ">=": ge, "=": eq, "<": lt, "<=": le}


LIMITS: ContextVar[ServeSettings] = ContextVar("LIMITS")  # of the server that parses a body


def _limit(name: str, count: int, sentence: str) -> None:
    """Raise an error of type limit, which is answered 413; the sentence has a place for the count."""
    most = getattr(LIMITS.get(), name)
    if count > most:
        text = f"{sentence.format(f'{count:,}')}; this server takes {most:,} (--{name})."
        raise PydanticCustomError("limit", text)


def _storable(text: str) -> str:
    _limit("max_title_characters", len(text), "a text has {} characters")
    if "\0" in text or (
        not text.isascii() and text != text.encode(errors="ignore").decode()
    ):
        raise ValueError("it holds a NUL or half a surrogate pair, which databases refuse")
    return text


def _id(value: object) -> object:
    return str(value) if type(value) is int else value


def _column(value: object) -> str:
    try:
        return "" if value is None else text_of("it", value)
    except DataError as error:  # a ValueError has pydantic name the field
        raise ValueError(str(error)) from None


def _kind(value: object) -> str:
    return "<item>" if isinstance(value, dict | ItemBody) else "<id>"


def _at_most(name: str) -> BeforeValidator:
    """A list is no longer than the server's limit of this name; its entries are not looked at before."""

    def check(value: object) -> object:
        _limit(name, len(value) if isinstance(value, list) else 0, "a list has {} entries")
        return value

    return BeforeValidator(check)


T = TypeVar("T")
Listed = Annotated[list[T], _at_most("max_candidates")]
Text = Annotated[str, AfterValidator(_storable)]
Column = Annotated[Text, BeforeValidator(_column)]
Id = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=256),
    AfterValidator(_storable),
    BeforeValidator(_id),  # runs first
]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Label = Literal[0, 1]


class Bounded(BaseModel):
    """An object whose keys are few and short."""

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, given: object) -> object:
        if isinstance(given, dict):
            _limit("max_item_columns", len(given), "an object has {} columns")
            for name in given:
                _storable(name)
        return given


class Document(Bounded):
    """A text that may have an id; what else clients send with it is not read."""

    item_id: Id | None = None
    title: Text | None = Field(None, validation_alias=AliasChoices("title", "text"))

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not (self.item_id or (self.title or "").strip()):
            raise ValueError("an item needs an item_id or a title")
        return self

    def item(self) -> Item:
        """An empty id is that of the title."""
        context = getattr(self, "context", None) or {}
        columns = tuple((self.model_extra or {}).items())
        return Item(self.item_id or "", self.title or "", columns, tuple(context.items()))


class ItemBody(Document, extra="allow"):
    """An item by id, by title, or a new one: further keys are columns of the items table, as it has them."""

    __pydantic_extra__: dict[str, Column] = Field(init=False)
    title: Text | None = None
    # of a candidate alone, such as its position, or of an event
    context: dict[str, Any] | None = None


class HistoryRowBody(ItemBody):
    """An item that the user answered; where no row has a time the order of the list counts."""

    label: Label | None = None
    rating: Finite | None = Field(None, description="Makes the label, by the run's rule.")
    time: Finite | None = Field(None, ge=0, description="Seconds since 1970.")


Candidate = Annotated[
    Annotated[Id, Tag("<id>")] | Annotated[ItemBody, Tag("<item>")], Discriminator(_kind)
]


class Options(BaseModel):
    """Keys that every scoring request may have; Cohere's client sends them as `additional_body_parameters`."""

    deadline_ms: Finite | None = Field(
        None, gt=0, le=3_600_000, description="Then the deepest exit answers."
    )

    top_n: int | None = Field(
        None, ge=1, description="The best so many are listed; others may leave early."
    )
    exhaustive: bool = Field(
        False, description="Score every candidate by the plan, then list the best top_n."
    )

    @property
    def deadline(self) -> float | None:
        """time.monotonic() seconds, counted from now."""
        return (
            None if self.deadline_ms is None else time.monotonic() + self.deadline_ms / 1000
        )


# of what asks; values of context and of attributes may be nested deeper than can be dumped
NOT_DUMPED = {"context", "user", "history", "deadline_ms", "candidates"}


class AskingBody(Options):
    """A user, or somebody with a history of their own. An unknown key is an error."""

    user_id: Id | None = None
    history: Annotated[list[HistoryRowBody], _at_most("max_history_rows")] | None = None
    context: dict[str, Any] | None = Field(
        None, description="Context of all candidates: columns that the run's log has."
    )
    user: dict[str, Any] | None = Field(
        None, description="Attributes of somebody unknown, or in place of the log's."
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        check_names(
            body if isinstance(body, dict) else (), list(cls.model_fields), "unknown key"
        )
        return body

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("expected either user_id or history")
        return self

    def _asked(self, name: str) -> dict[str, Any]:
        """Fields of its request but for candidates."""
        rows = None
        if self.history is not None:
            rows = [HistoryRow(r.item(), r.label, r.time, r.rating) for r in self.history]
        return self.model_dump(exclude=NOT_DUMPED) | {
            "history": rows,
            "deadline": self.deadline,
            "context": self.context,
            "user": self.user,
            "request_id": name,
        }


class RankBody(AskingBody):
    """Score candidates."""

    candidates: Listed[Candidate] = Field(min_length=1)

    def request(self, name: str) -> RankRequest:
        """For the queue."""
        items = [c if isinstance(c, str) else c.item() for c in self.candidates]
        return RankRequest(candidates=items, **self._asked(name))


def _all_limited(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lists = [one.get("candidates") for one in requests]
    count = sum(len(of) for of in lists if isinstance(of, list))
    _limit("max_candidates", count, "the requests have {} candidates")
    return requests


class RankBodies(BaseModel, extra="forbid"):
    """Several requests, each of which is checked alone; all their candidates are bounded together."""

    requests: Annotated[
        Listed[dict[str, Any]], Field(min_length=1), AfterValidator(_all_limited)
    ]


RankBodyOrBodies = Annotated[
    Annotated[RankBody, Tag("<one>")] | Annotated[RankBodies, Tag("<requests>")],
    Discriminator(
        lambda of: "<requests>" if isinstance(of, dict) and "requests" in of else "<one>"
    ),
]


class Between(BaseModel, extra="forbid"):
    """A number of a column of the items table, the bounds included."""

    min: Finite | None = None
    max: Finite | None = None


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


Condition = Annotated[
    Annotated[Between, Tag("<bounds>")]
    | Annotated[
        Listed[Column], Field(min_length=1), BeforeValidator(_listed), Tag("<values>")
    ],
    Discriminator(lambda of: "<bounds>" if isinstance(of, dict | Between) else "<values>"),
]


class RecommendBody(AskingBody):
    """List the best of all items that are not answered and pass."""

    top_n: int = Field(10, ge=1)
    filter: dict[Text, Condition] = Field(
        {},
        description='By column: a value, a list of which it has one, or {"min": 1, "max": 2}.',
    )
    allow: Listed[Id] | None = Field(None, description="Only these may be listed.")
    deny: Listed[Id] = Field([], description="These are not listed.")
    at_most: dict[Text, Annotated[int, Field(ge=1)]] = Field(
        {}, description="By column: how many items of one value are listed."
    )
    include_answered: bool = False

    def request(self, name: str) -> RecommendRequest:
        """For the queue."""
        return RecommendRequest(**self._asked(name))


class Queried(Options):
    """Keys beside a query: who asks and which items the texts are, where the client knows."""

    query: Text = Field(description="A user id, or else text that is shown as the history.")
    user_id: Id | None = None
    item_ids: Listed[Id] | None = Field(None, description="An id for each text.")

    def request(self, texts: Sequence[str | Document], name: str) -> RankRequest:
        """A text is an item id, a known title, or the title of a new item; a query nobody's id is a liked item."""
        # 1. candidates: by their texts, and by ids where the client knows them
        items = [
            Item(title=text) if isinstance(text, str) else text.item() for text in texts
        ]
        if self.item_ids is not None:
            if len(self.item_ids) != len(items):
                raise DataError(
                    f"item_ids has {len(self.item_ids)} ids for {len(items)} texts; give one each."
                )
            items = [
                item._replace(item_id=one)
                for item, one in zip(items, self.item_ids, strict=True)
            ]
        # 2. who asks: a user that the client names, else the query, a user or a text that
        # somebody liked
        liked = None
        if not self.user_id:
            liked = [HistoryRow(Item(title=self.query), 1)] if self.query.strip() else []
        return RankRequest(
            self.user_id or self.query,
            liked,
            items,
            self.deadline,
            self.top_n,
            self.exhaustive,
            request_id=name,
        )


class CohereBody(Queried):
    """Cohere's rerank, both versions; Gorse's LLM ranker sends it too. Its other keys are not read."""

    documents: Listed[Text | Document] = Field(min_length=1)
    return_documents: bool = False


class TeiBody(Queried):
    """Text Embeddings Inference's rerank. Its other keys are not read."""

    texts: Listed[Text] = Field(min_length=1)
    raw_scores: bool = False
    return_text: bool = False


RerankBody = Annotated[
    Annotated[CohereBody, Tag("<documents>")] | Annotated[TeiBody, Tag("<texts>")],
    Discriminator(
        lambda body: (
            "<texts>" if isinstance(body, dict) and "texts" in body else "<documents>"
        )
    ),
]
"""`/rerank` is Cohere's and TEI's; they differ in a key."""


# Responses


class Usage(BaseModel, from_attributes=True):
    """What the request cost, what it would have cost at full depth, and how many candidates left at each layer."""

    token_layers: int
    full_depth_token_layers: int
    left_at: dict[int, int]


class RankedItem(BaseModel):
    """A candidate: its place in the request, its score, the exit it left at, the retrieved features behind it."""

    index: int
    item_id: str
    title: str
    probability: float
    exit_layer: int
    why: dict[str, float]
    source: str | None = Field(None, description="Of a recommendation: what found it.")


class RankResponse(BaseModel):
    """Candidates by probability, best first. `late`: the deadline cut it; `full_depth`: the drift alarm is on."""

    id: str
    model: str
    items: list[RankedItem]
    usage: Usage
    depth_saved: float = Field(
        description="Share of full depth's token-layers that was not run; below 0 where a kept history went deeper."
    )
    late: bool
    full_depth: bool


class CohereResult(BaseModel):
    """A document's place and score, and, where it is asked for, its text."""

    index: int
    relevance_score: float
    exit_layer: int
    document: dict[str, str] | None = None


class CohereResponse(BaseModel):
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


def rank_response(found: Scored, places: Sequence[int]) -> RankResponse:
    """Our own, of the candidates at these places."""
    chance = found.probabilities.tolist()
    layer = found.exit_layers.tolist()
    columns = {name: values.tolist() for name, values in found.features.items()}
    items = [
        RankedItem(
            index=k,
            item_id=found.item_ids[k],
            title=found.titles[k],
            probability=chance[k],
            exit_layer=layer[k],
            source=found.sources[k] if found.sources else None,
            why={
                name: values[k]
                for name, values in columns.items()
                if values[k] == values[k]
            },
        )
        for k in places
    ]
    return RankResponse(
        id=found.request_id,
        model=found.run,
        items=items,
        usage=Usage.model_validate(found),
        depth_saved=1 - found.token_layers / max(found.full_depth_token_layers, 1),
        late=found.late,
        full_depth=found.full_depth,
    )


def cohere_response(body: CohereBody, found: Scored) -> CohereResponse:
    """Cohere's, for both versions."""
    sent = [d if isinstance(d, str) else d.title or "" for d in body.documents]
    shown = [{"text": text} if body.return_documents else None for text in sent]
    chance = found.probabilities.tolist()
    layer = found.exit_layers.tolist()
    results = [
        CohereResult(
            index=k, relevance_score=chance[k], exit_layer=layer[k], document=shown[k]
        )
        for k in found.best_first(body.top_n)
    ]
    return CohereResponse(
        id=found.request_id,
        model=found.run,
        results=results,
        usage=Usage.model_validate(found),
    )


def tei_response(body: TeiBody, found: Scored) -> list[TeiResult]:
    """TEI's; raw scores are logits."""
    scores = (found.logits if body.raw_scores else found.probabilities).tolist()
    texts = body.texts if body.return_text else [None] * len(body.texts)
    return [
        TeiResult(index=k, score=scores[k], text=texts[k])
        for k in found.best_first(body.top_n)
    ]


# Events


class NewItem(ItemBody):
    """An item that becomes known."""

    item_id: Id
    title: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1),
        AfterValidator(_storable),
    ]


class UserBody(Bounded, extra="allow"):
    """A user; further keys are attributes that the run's log has."""

    user_id: Id


class EventBody(ItemBody):
    """An answer of a user. A title, and further columns, make an item known that was not."""

    event_id: Id
    user_id: Id
    item_id: Id
    rating: Finite | None = None
    label: Label | None = None
    timestamp: Finite = Field(ge=0, description="Seconds since 1970.")
    # the user's rows of the item dated until then
    replaces: bool = False


class GorseFeedback(BaseModel):
    """Gorse's feedback: its type, and a condition on its value, say what it means. Its other keys are not read."""

    FeedbackType: Id
    UserId: Id
    ItemId: Id
    Value: Finite | None = None
    Timestamp: AwareDatetime | Literal[""] | None = None

    def event(self, settings: ServeSettings) -> EventBody:
        """The same as ours; type, user, item and time name it, as in Gorse."""
        # 1. yes or no
        positive = settings.gorse_positive
        read = settings.gorse_read
        likes = self._is_one_of(positive)
        if not likes and self.FeedbackType not in re.findall(r"[^\s,<>=]+", read):
            raise DataError(
                f"feedback of the type {self.FeedbackType!r} means neither yes nor no here; start the server with "
                f"Gorse's positive_feedback_types as --gorse_positive (now {positive!r}), its read_feedback_types as "
                f"--gorse_read (now {read!r})."
            )
        # 2. its name and time
        at = self.Timestamp
        named = "\0".join(map(str, (self.FeedbackType, self.UserId, self.ItemId, at or "")))
        # without a time it is now; Gorse's year 1 is none
        seconds = at.timestamp() if isinstance(at, datetime) else -1
        return EventBody(
            event_id=f"gorse-{hashlib.sha256(named.encode()).hexdigest()[:32]}",
            user_id=self.UserId,
            item_id=self.ItemId,
            timestamp=seconds if seconds >= 0 else time.time(),
            label=1 if likes else 0,
        )

    def _is_one_of(self, types: str) -> bool:
        """Whether it is of one of these types, whose condition holds for its value (0 where it has none)."""
        for name, sign, value in re.findall(
            r"([^\s,<>=]+)\s*(?:([<>=]+)\s*([\d.+-]+))?", types
        ):
            if name == self.FeedbackType:
                return not sign or bool(CONDITIONS[sign](self.Value or 0.0, float(value)))
        return False


def labelled(events: Sequence[EventBody], rule: str | None) -> list[Event]:
    """Events with the label that the run's protocol gives them; `DataError` where one of their own differs."""
    latest = time.time() + AHEAD
    found = list[Event]()
    for k, event in enumerate(events):
        place = f"event {k} ({event.event_id!r})"
        if event.timestamp > latest:
            raise DataError(
                f"{place} is dated {event.timestamp:.0f}, after now; give seconds since 1970."
            )
        label = label_of(event.rating, event.label, rule, place)
        found.append(
            Event(
                event.event_id,
                event.user_id,
                event.item_id,
                label,
                event.timestamp,
                json.dumps(event.context, sort_keys=True) if event.context else "",
                event.rating,
            )
        )
    return found


def new_items(bodies: Sequence[EventBody | NewItem]) -> list[dict[str, str]]:
    """Rows of the items table that bodies bring a title of."""
    return [
        body.model_dump(
            exclude={*type(body).model_fields} - {"item_id", "title"}, exclude_none=True
        )
        for body in bodies
        if body.title
    ]
