from pathlib import Path

import numpy as np
import polars as pl
import pytest
from transformers import AutoTokenizer

from project.data.prompt import Prompt, PromptEncoder, item_columns, tells_numbers, with_segment
from project.errors import ConfigError

ITEMS = pl.DataFrame(
    {"item": [0, 1], "item_id": ["a", "b"], "title": ["Alien", "Brazil {1}"], "year": ["1979", ""]}
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
        "answers": [[1, 0, 0, 0], []],
    }
)


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text]


def texts(prompt: Prompt, label: list[int]) -> list[tuple[str, str]]:
    """(whole segment, its part up to the answer slot)."""
    encoder = PromptEncoder(Letters(), prompt, ITEMS)
    segments = encoder.encode(np.array([0, 1]), RETRIEVED, np.array(label, dtype=np.int8))
    rows = [segments.tokens[i].tolist() for i in range(2)]
    return [
        ("".join(map(chr, r)), "".join(map(chr, r[: s + 1])))
        for r, s in zip(rows, segments.slots, strict=True)
    ]


def test_golden() -> None:
    """.74 is 74 percent, nothing counted is "?"; the slot is the last token before the answer."""
    prompt = Prompt(segment="{title} ({year}) all {item_percent} near {vote_percent}:")
    assert texts(prompt, [1, 0]) == [
        ("Alien (1979) all 74 near 25: yes", "Alien (1979) all 74 near 25:"),
        ("Brazil {1} () all ? near ?: no", "Brazil {1} () all ? near ?:"),
    ]


def test_counts_and_fields_in_any_place() -> None:
    """37 rounds down to 20; likes and neighbours are plain counts; a template may start with retrieved features."""
    prompt = Prompt(segment="{likes}/{neighbours} {item_count} {user_count} {user_percent} {title}?")
    assert texts(prompt, [-1, -1])[0] == ("1/4 20 2 50 Alien?",) * 2


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "00"), (0.045, "05"), (0.74, "74"), (0.999, "99"), (1.0, "99")]
)
def test_percent_is_two_digits(share: float, text: str) -> None:
    """.045 is 5 percent (half up), written 05; certainty is written 99."""
    retrieved = RETRIEVED.with_columns(item_rate=pl.Series([share, None]))
    encoder = PromptEncoder(Letters(), Prompt(segment="{item_percent}"), ITEMS)
    segments = encoder.encode(np.array([0, 1]), retrieved, np.array([-1, -1], dtype=np.int8))
    assert ["".join(map(chr, segments.tokens[i])) for i in range(2)] == [text, "?"]


def test_titles_are_shortened() -> None:
    """A length cuts titles and attributes; what is shorter stays."""
    assert texts(Prompt(segment="{title:.6} {year:.2}:"), [-1, -1])[0][0] == "Alien 19:"
    assert texts(Prompt(segment="{title:.6}:"), [-1, -1])[1][0] == "Brazil:"


def test_least_lengths() -> None:
    """Text of the item, one token for each field of retrieved features, and the longer answer."""
    encoder = PromptEncoder(Letters(), Prompt(segment="{title} {item_percent}{vote_number}:"), ITEMS)
    assert encoder.least_lengths().tolist() == [len("Alien ??: yes"), len("Brazil {1} ??: yes")]


def test_unknown_answer_adds_nothing() -> None:
    """A candidate (label -1) ends at its answer slot."""
    assert all(whole == before for whole, before in texts(Prompt(segment="{title}:"), [-1, -1]))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt(segment="{title} {director}:"), ["{director}", "title, year", "item_percent"]),
        (Prompt(segment="{title"), ["data.prompt.segment"]),
        (Prompt(segment=""), ["data.prompt.segment", "empty"]),
        (Prompt(answers=[" no"]), ["data.prompt.answers"]),
        (Prompt(answers=[" no", " "]), ["data.prompt.answers"]),
    ],
)
def test_bad_wording(prompt: Prompt, words: list[str]) -> None:
    """A template that cannot be filled names its key, and the fields there are."""
    with pytest.raises(ConfigError) as error:
        PromptEncoder(Letters(), prompt, ITEMS)
    assert all(word in str(error.value) for word in words)


def test_a_control_token_in_a_title_is_text(tiny_model: Path) -> None:
    """A title, attribute or list holds no special token whatever it says; ids of other titles are as before."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    items = ITEMS.with_columns(title=pl.Series(["The <|im_end|>", "the sea"]))
    prompt = Prompt("<|im_end|>", "{title} {year}:", similar="S {titles}")
    encoder = PromptEncoder(tokenizer, prompt, items)
    segments = encoder.encode(np.array([0, 1]), RETRIEVED, np.array([-1, -1], dtype=np.int8))
    assert special not in segments.tokens.values
    assert special not in encoder.encode_similar([[0]]).values
    assert tokenizer.decode(segments.tokens[0]).startswith("The <|im_end|>")
    assert segments.tokens[1].tolist() == tokenizer.encode("the sea :", add_special_tokens=False)
    assert encoder.instruction.tolist() == [special]  # who writes the wording may mean one


def test_the_default_segment_shows_short_columns_and_numbers() -> None:
    """Title always, other columns up to a median of 12 tokens, no name of retrieved features, and numbers."""
    columns = {"plot": ["x" * 13, ""], "year": ["1" * 12, "2" * 12], "likes": ["1", "2"], "a.b": ["1", "2"]}
    items = pl.DataFrame({"item": [0, 1], "item_id": ["a", "b"], "title": ["t" * 50, "u" * 50], **columns})
    found = with_segment(Prompt(), Letters(), items, ["mf_number"])
    assert found.segment == "{title}, {year}{item_number+user_number+vote_number+text_number+mf_number}"
    assert item_columns(found, items) == (["title", "year"], ["plot", "likes", "a.b"])
    assert with_segment(found, Letters(), items) is found
    assert tells_numbers(None)
    assert tells_numbers(found.segment)
