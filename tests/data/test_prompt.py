"""Prompts: templates are cut where retrieved features stand, filled with them and with items, and fit into a window.

Numbers are ids below zero that say what counting counted, to a step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoTokenizer
from world import Letters, read_split, streams_without_retrieved, text_of

from project.data.logs import TableLogs
from project.data.prompt import (
    LOWEST_ID,
    NUMBERS,
    SPAN,
    STEPS_A_UNIT,
    Prompt,
    PromptEncoder,
    RatingScale,
    field_names,
    item_columns,
    number_ids,
    read_number_ids,
    shows_numbers,
    split_template,
    with_segment,
)
from project.data.protocol import Protocol, SplitInteractions
from project.data.requests import check_items, check_streams
from project.datamodule import InteractionData
from project.errors import ConfigError
from project.features import FEATURES, feature_matrix
from project.retrieval import NoRetriever

ITEMS = pl.DataFrame(
    {
        "item": [0, 1],
        "item_id": ["a", "b"],
        "title": ["Alien", "Brazil {1}"],
        "year": ["1979", ""],
    }
)
RETRIEVED = pl.DataFrame(
    {
        "row_id": [0, 1],
        "item_rate": [0.74, None],
        "item_count": [37, 0],
        "user_rate": [0.5, None],
        "user_count": [2, 0],
        "vote": [0.25, None],
        "neighbour_count": [4, 0],
        "weighted_vote": [0.25, None],
        "vote_weight": [2.0, 0.0],
    }
)


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("{title} ({year}):", [("static", "{title} ({year}):")]),
        (
            "{title} all{item_percent}/10 near{vote_percent}",
            [
                ("static", "{title} all"),
                ("retrieved", "item_percent"),
                ("static", "/10 near"),
                ("retrieved", "vote_percent"),
            ],
        ),
        (
            "{item_number+vote_number}{{{title}}}",
            [("number", "item_number+vote_number"), ("static", "{{{title}}}")],
        ),
        (
            "{title:.40} {mf_percent}",
            [("static", "{title:.40} "), ("retrieved", "mf_percent")],
        ),
    ],
)
def test_pieces(template: str, pieces: list[tuple[str, str]]) -> None:
    """Text and item fields between two places of retrieved features are one piece; braces that are text stay text."""
    assert split_template(template, ["title", "year"]) == pieces


def test_fields() -> None:
    """In order, as often as they stand there; a column may have the name of retrieved features that is not told."""
    assert field_names("{title:.40} {vote!r}{title}") == ["title", "vote", "title"]
    assert field_names("{title") == []
    assert split_template("{title}", ["title", "mf_percent"]) == [("static", "{title}")]
    assert shows_numbers("{title}{vote_number+item_number}:")
    assert shows_numbers("{title}{vote_number}:")
    assert not shows_numbers("{title} all{item_percent}:")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{title!r}", r"{title!r}.*{title:\.40}"),
        *(
            (f"{{title:{spec}}}", r"{title:\.40}")
            for spec in (".0", ">9", "9", "9.9", ".3s", "." + 20 * "9")
        ),
        ("{vote_percent:.1}", "{vote_percent} alone"),
        ("{item_number:.1}", "{item_number} alone"),
        *((name, "which is unknown") for name in ("{a.b}", "{x[1]}", "{7}", "{director}")),
        *(
            (f"{{item_number+{name}}}", "which is unknown.*each once")
            for name in ("year", "item_number", "")
        ),
        (
            "{mf_percent}",
            "a retrieved feature and also a column.*my_mf_percent: mf_percent",
        ),
        ("{vote_number}", "a retrieved feature and also a column"),
        ("{item_text}", "also a column"),
    ],
)
def test_fields_that_cannot_be_filled(template: str, words: str) -> None:
    fields = ["title", "year", "mf_percent", "vote_number", "item_text", "a.b", "x[1]", "7"]
    with pytest.raises(ConfigError, match=words):
        split_template(template, fields)


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        (Prompt(segment="{title"), "segment"),
        (Prompt(segment=""), "segment"),
        (Prompt(answers=[" no"]), "answers"),
        (Prompt(answers=[" no", " "]), "answers"),
        *(
            (Prompt(segment="{title}:", similar=similar), "similar")
            for similar in (
                "Similar users liked",
                "{titles} {titles}",
                "{title}",
                "{titles",
                "{}",
            )
        ),
    ],
)
def test_bad_wording(prompt: Prompt, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.prompt\.{key}"):
        PromptEncoder(Letters(), prompt, ITEMS)


def texts(
    segment: str, label: list[int], retrieved: pl.DataFrame = RETRIEVED
) -> list[tuple[str, str]]:
    """(whole segment, its part up to the answer slot)."""
    encoder = PromptEncoder(Letters(), Prompt(segment=segment), ITEMS)
    segments = encoder.encode(np.array([0, 1]), retrieved, np.array(label, dtype=np.int8))
    rows = [text_of(segments.tokens[i]) for i in range(2)]
    return [(row, row[: slot + 1]) for row, slot in zip(rows, segments.slots, strict=True)]


@pytest.mark.parametrize(
    ("segment", "labels", "expected"),
    [
        # .74 is 74 percent, nothing counted is "?"; the slot is the last token before the
        # answer
        (
            "{title} ({year}) all {item_percent} near {vote_percent}:",
            [1, 0],
            [
                ("Alien (1979) all 74 near 25: yes", "Alien (1979) all 74 near 25:"),
                ("Brazil {1} () all ? near ?: no", "Brazil {1} () all ? near ?:"),
            ],
        ),
        # without an answer the slot is the end
        (
            "{user_percent} {title}?",
            [-1, -1],
            [("50 Alien?",) * 2, ("? Brazil {1}?",) * 2],
        ),
        # a length cuts titles and attributes; what is shorter stays
        ("{title:.6} {year:.2}:", [-1, -1], [("Alien 19:",) * 2, ("Brazil :",) * 2]),
    ],
)
def test_golden(segment: str, labels: list[int], expected: list[tuple[str, str]]) -> None:
    assert texts(segment, labels) == expected


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "00"), (0.045, "05"), (0.74, "74"), (0.999, "99"), (1.0, "99")],
)
def test_percent_is_two_digits(share: float, text: str) -> None:
    retrieved = RETRIEVED.with_columns(item_rate=pl.Series([share, None]))
    assert [whole for whole, _ in texts("{item_percent}", [-1, -1], retrieved)] == [
        text,
        "?",
    ]


def test_a_control_token_in_a_title_is_text(tiny_model: Path) -> None:
    """A title, attribute or list holds no special token whatever it says; ids of other titles are as before."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    items = ITEMS.with_columns(title=pl.Series(["The <|im_end|>", "the sea"]))
    prompt = Prompt("<|im_end|>", "{title} {year}:<|im_end|>", similar="S {titles}")
    encoder = PromptEncoder(tokenizer, prompt, items)
    segments = encoder.encode(
        np.array([0, 1]), RETRIEVED, np.array([-1, -1], dtype=np.int8)
    )
    # but who writes the wording may mean one
    assert encoder.instruction.tolist() == [special]
    assert [own.tolist().count(special) for own in segments.tokens] == [1, 1]
    assert special not in encoder.encode_similar([[0]]).values
    assert tokenizer.decode(segments.tokens[0]).startswith("The <|im_end|>")
    assert segments.tokens[1].tolist() == [*tokenizer.encode("the sea :"), special]


def test_the_default_segment_shows_short_columns_and_numbers() -> None:
    """Title always, other columns up to a median of 12 tokens, no name of retrieved features, and numbers."""
    columns = {
        "plot": ["x" * 13, ""],
        "year": ["1" * 12, "2" * 12],
        "mf_percent": ["1", "2"],
        "a.b": ["1", "2"],
    }
    items = pl.DataFrame(
        {"item": [0, 1], "item_id": ["a", "b"], "title": ["t" * 50, "u" * 50], **columns}
    )
    found = with_segment(Prompt(), Letters(), items, ["mf_number"])
    assert (
        found.segment
        == "{title}, {year}{item_number+user_number+vote_number+text_number+mf_number}"
    )
    assert item_columns(found, items) == (["title", "year"], ["plot", "mf_percent", "a.b"])
    assert with_segment(found, Letters(), items) is found
    assert shows_numbers(None)
    assert shows_numbers(found.segment)


@pytest.fixture(scope="module")
def split(tiny_logs: Path) -> SplitInteractions:
    return read_split(tiny_logs, Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2]))


def test_prompts_fit_or_are_named(split: SplitInteractions) -> None:
    """Just enough room is enough; a token less names the item, its tokens, the key and what helps.

    A retrieved feature has one token at least.
    """
    items = split.interactions.items
    item_id, title = max(
        items.select("item_id", "title").iter_rows(), key=lambda row: len(row[1])
    )
    tokens = len(f"I\n{title} ??: yes")
    prompt = Prompt("I\n", "{title} {item_percent}{vote_number}:")
    encoder = PromptEncoder(Letters(), prompt, items)
    check_items(encoder, items, tokens)
    words = rf"item '{item_id}' alone has {tokens} tokens .* data\.context_tokens is {tokens - 1} .*{{title:\.40}}"
    with pytest.raises(ConfigError, match=words):
        check_items(encoder, items, tokens - 1)
    segment = "{title} {vote_percent}{vote_percent}:"
    streams = streams_without_retrieved(split, "test", segment)
    tokens = int(streams.tokens.lengths.max()) + len("I\n")
    check_streams(streams, tokens)
    with pytest.raises(ConfigError, match=rf"has {tokens} tokens.*{{title:\.40}}"):
        check_streams(streams, tokens - 1)


def test_the_datamodule_asks_before_it_retrieves(
    tiny_logs: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long title stops a run before retrieved features is made; shortened or not asked about it does not."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    items = pl.read_csv(tiny_logs / "items.csv")
    long = pl.when(pl.col("item_id") == "i7").then(pl.lit("sea " * 4500)).otherwise("title")
    items.with_columns(title=long).write_csv(tmp_path / "items.csv")
    logs = TableLogs(str(tiny_logs / "interactions.csv"), str(tmp_path / "items.csv"))

    def data(segment: str, requests: str | None = None) -> InteractionData:
        prompt, protocol = Prompt(segment=segment), Protocol(label="rating > 3")
        tokenizer = str(tiny_model)
        return InteractionData(
            logs,
            NoRetriever(),
            protocol,
            prompt=prompt,
            tokenizer=tokenizer,
            requests=requests,
        )

    stopped = data("{title}:")
    with pytest.raises(ConfigError, match=r"item 'i7' .* data\.context_tokens is 1,024"):
        stopped.prepare_data()
    assert "retrieved" not in vars(stopped)
    data("{title:.40}:").setup("fit")
    asked = tmp_path / "requests.jsonl"
    asked.write_text('{"request_id": "a", "user_id": "u1", "candidates": ["i1"]}\n')
    predicting = data("{title}:", str(asked))
    predicting.prepare_data()
    predicting.setup("predict")
    assert predicting.requests is not None
    assert [r.request_id for r in predicting.requests.requests] == ["a"]


# Numbers


def retrieved(n: int = 2) -> pl.DataFrame:
    """Random rows; the first has item_rate .75 of 20 rows, the last has no retrieved features at all."""
    rng = np.random.default_rng(0)
    answers = [
        rng.integers(0, 2, k).tolist() for k in [*rng.integers(0, 6, n - 1).tolist(), 0]
    ]
    rates = {
        name: rng.random(n) for name in ("item_rate", "user_rate", "mf", "item_similarity")
    }
    counts = {
        name: rng.integers(1, 60, n)
        for name in ("item_count", "user_count", "item_similarity_weight")
    }
    rates["item_rate"][0], counts["item_count"][0] = 0.75, 20
    lists = {
        "neighbour_count": list(map(len, answers)),
        "vote": [sum(a) / len(a) if a else None for a in answers],
        "weighted_vote": [sum(a) / len(a) if a else None for a in answers],
        "vote_weight": [0.5 * len(a) for a in answers],
    }
    known = pl.when(pl.col("row_id") < n - 1)
    table = pl.DataFrame({"row_id": np.arange(n), **rates, **counts, **lists})
    return table.with_columns(
        known.then(pl.col(*rates)), known.then(pl.col(*counts)).otherwise(0)
    )


def ids_of(table: pl.DataFrame, fields: list[str]) -> np.ndarray:
    return number_ids(feature_matrix(table, 0.5), fields)


def test_numbers_golden() -> None:
    """15 of 20 and five more at even odds: log(17.5 / 7.5) = .847, rounded .85, the 137th of .05 from -6 on.

    The count is three bytes further: log(1 + 20) - 3 = .045, rounded .05, the 121st.
    """
    assert ids_of(retrieved(), ["item_number"])[0] == -138
    assert ids_of(retrieved(), ["item_count_number"])[0] == -122 * 256**5
    assert (
        ids_of(retrieved(), ["item_count_number", "item_number"])[0] == -138 - 122 * 256**5
    )


def test_nothing_known_is_even_odds() -> None:
    """A row without retrieved features reads as 0 in every rate, and as no rows in every count."""
    told, values = read_number_ids(torch.tensor(ids_of(retrieved(), list(NUMBERS))[-1:]))
    assert told.all()
    assert values[0].tolist() == [-3.0 if "count" in field else 0.0 for field in NUMBERS]


@pytest.mark.parametrize(
    "fields", [*([field] for field in NUMBERS), [*NUMBERS], [*NUMBERS][::-2]]
)
def test_ids_say_fields_and_values(fields: list[str]) -> None:
    """Read back, an id is its fields and their counting features, to half a step, within the span; nothing else."""
    table = retrieved(300)
    features, ids = feature_matrix(table, 0.5), ids_of(table, fields)
    assert np.iinfo(np.int64).min < LOWEST_ID <= ids.min() <= ids.max() < 0
    told, values = read_number_ids(torch.from_numpy(ids))
    for kind, (field, (feature, zero)) in enumerate(NUMBERS.items()):
        assert told[:, kind].all() if field in fields else not told[:, kind].any()
        if field in fields:
            expected = (features[:, FEATURES.index(feature)] - zero).clip(-SPAN, SPAN)
            np.testing.assert_allclose(
                values[:, kind].numpy(), expected, atol=0.5 / STEPS_A_UNIT + 1e-5
            )


def test_a_rating_stands_in_place_of_the_answer() -> None:
    """Standardised by train's: 5 of mean 3 and deviation 2 is 1; without one, or without an answer, as ever."""
    encoder = PromptEncoder(
        Letters(), Prompt(segment="{title}:"), ITEMS, scale=RatingScale(3.0, 2.0)
    )
    item = np.array([0, 0, 0])
    label = np.array([1, 0, -1], dtype=np.int8)
    found = encoder.encode(item, RETRIEVED[[0, 0, 0]], label, np.array([5.0, np.nan, 5.0]))
    told, values = read_number_ids(torch.from_numpy(found.tokens[0][-1:]), len(NUMBERS) + 1)
    assert told[0].tolist() == [False] * len(NUMBERS) + [True]
    assert float(values[0, -1]) == pytest.approx(1.0)
    assert text_of(found.tokens[1]).endswith(": no")
    assert text_of(found.tokens[2]).endswith(":")
    start = found.slots[0] + 1
    assert found.tokens[2].tolist() == found.tokens[0][:start].tolist()


def test_segments_hold_one_token_a_field() -> None:
    prompt = Prompt(segment="{title} {mf_number}{item_number+user_number}:")
    encoder = PromptEncoder(Letters(), prompt, ITEMS)
    table = retrieved()
    mf, rates = (
        ids_of(table, fields) for fields in (["mf_number"], ["item_number", "user_number"])
    )
    found = encoder.encode(np.array([0, 1]), table, np.array([1, -1], dtype=np.int8)).tokens
    assert found[0].tolist() == [*map(ord, "Alien "), mf[0], rates[0], *map(ord, ": yes")]
    assert found[1].tolist() == [*map(ord, "Brazil {1} "), mf[1], rates[1], ord(":")]
