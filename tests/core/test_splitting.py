"""Laws and examples of `Splitter`: how a text becomes references."""

import re
import string
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer

from m3backends.embedders.sentence_transformers import SentenceTransformersEmbedder
from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.splitting import CountTokens, Splitter
from m3runtime.errors import ConfigError, InputError

DICTIONARY = Path(__file__).parent / "dictionary" / "computing.txt"


def tiny_tokenizer() -> Tokenizer:
    """Words, marks and line breaks are tokens, and of a long word every four letters."""
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"\w{1,4}|[^\w\s]|\n"), "isolated")
    return tokenizer


def counter(tokenizer: Tokenizer) -> CountTokens:
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


TINY = counter(tiny_tokenizer())
WORDS: CountTokens = lambda text: len(text.split())  # noqa: E731 - as short as it is clear

prose = st.lists(
    st.sampled_from(
        ("word", "Lamp", "oil.", "Why?", "# Head", "follows:", "\n", "\n\n", "\n \n", "  ", "\t", "é", "😀",
         "東京", "- ", "antidisestablishment", "====", "\r\n", "\u2028", "\x1c", "\u205f", "👩‍👩‍👧")
    )
).map(" ".join)  # fmt: skip
texts = prose | st.text(st.characters(exclude_categories=["Cs"])) | st.text(string.whitespace + "ab.")


def check(text: str, splitter: Splitter) -> list[Reference]:
    """Assert what holds of every split."""
    passages = splitter.split(text)
    end = 0
    for passage in passages:
        assert passage.text == text[passage.start : passage.end] == passage.text.strip() != ""
        assert passage.tokens == splitter.count_tokens(passage.text) <= splitter.max_tokens
        assert passage.start >= end
        assert not text[end : passage.start].strip()
        end = passage.end
    assert not text[end:].strip()
    assert splitter.split(text) == passages
    return passages


def texts_of(text: str, max_tokens: int, count: CountTokens = WORDS) -> list[str]:
    return [passage.text for passage in check(text, Splitter(count, max_tokens=max_tokens))]


class TestSplitting:
    @given(texts, st.integers(1, 12))
    @example("Long: " * 5 + "\n\n# a\n\n" + "b. " * 9, 4)
    @example("\x1c a b \x1f", 1)
    def test_laws_with_a_tiny_tokenizer(self, text: str, max_tokens: int) -> None:
        check(text, Splitter(TINY, max_tokens=max_tokens))

    @given(texts, st.integers(1, 40), st.lists(st.integers(0, 200)))
    @example("# a\n\nb:\n\n" + "word " * 30 + "\n\nc", 20, [3, 7, 11])
    def test_cut_into_blocks_it_is_split_alike(self, text: str, longest: int, cuts: list[int]) -> None:
        splitter = Splitter(TINY, max_tokens=5, longest=longest)
        ends = [0, *sorted(cuts), len(text)]
        blocks = [text[a:b] for a, b in pairwise(ends)]
        assert list(splitter.stream(blocks)) == check(text, splitter)

    @given(st.lists(st.sampled_from(["# Lamp", "One two three.", "four:", "Five\n----", "six \nseven"]), max_size=20))
    def test_text_in_short_sections_is_split_as_if_at_once(self, paragraphs: list[str]) -> None:
        text = "\n \n".join(f"# Head\n\n{paragraph}\n\nEight nine." for paragraph in paragraphs)
        assert Splitter(WORDS, max_tokens=4, longest=80).split(text) == Splitter(WORDS, max_tokens=4).split(text)

    @pytest.mark.real_model
    @given(text=texts, max_tokens=st.integers(8, 40))
    def test_laws_with_a_real_tokenizer(self, real_count: CountTokens, text: str, max_tokens: int) -> None:
        check(text, Splitter(real_count, max_tokens=max_tokens))

    @pytest.mark.parametrize("text", ["", " \n\n\t ", "\u3000"])
    def test_blank_text_has_no_passages(self, text: str) -> None:
        assert Splitter(TINY).split(text) == []

    def test_one_word(self) -> None:
        assert Splitter(TINY).split(" word\n") == [Reference("word", 1, places=(Place("", 1, 5),))]

    def test_sentences_are_kept_whole(self) -> None:
        text = "One two three. Four five six. Seven eight nine."
        pieces = [passage.text for passage in check(text, Splitter(WORDS, max_tokens=7))]
        assert pieces == ["One two three. Four five six.", "Seven eight nine."]

    def test_a_line_break_where_a_line_was_full_parts_no_sentence(self) -> None:
        text = "The lamp burns walnut oil and it\nstands on a tower. The ferry sails\nto the village every day."
        pieces = [passage.text for passage in check(text, Splitter(WORDS, max_tokens=12))]
        assert pieces == [
            "The lamp burns walnut oil and it\nstands on a tower.",
            "The ferry sails\nto the village every day.",
        ]

    def test_other_line_breaks_part(self) -> None:
        text = "- a lamp that burns. It burns oil\n- a ferry\n- a tower of stone"
        pieces = [passage.text for passage in check(text, Splitter(WORDS, max_tokens=8))]
        assert pieces == ["- a lamp that burns. It burns oil", "- a ferry\n- a tower of stone"]

    def test_paragraphs_are_joined_as_far_as_they_fit(self) -> None:
        text = "\n\n".join(["The lamp is purple.", "- The ferry", "- is slow.", "| bread | flat |"])
        assert texts_of(text, 128) == [text]
        assert texts_of(text, 8) == ["The lamp is purple.\n\n- The ferry", "- is slow.\n\n| bread | flat |"]

    def test_passages_of_a_section_are_about_equally_long(self) -> None:
        sizes = [passage.tokens for passage in check("One two three.\n\n" * 22, Splitter(WORDS, max_tokens=60))]
        assert sizes == [33, 33]

    @pytest.mark.parametrize("heading", ["## The lamp", "The lamp\n========", "The lamp\n~~~"])
    def test_a_section_has_its_own_passages(self, heading: str) -> None:
        before, burns, after = "The bell is old. " * 3, "It burns oil. " * 5, "It is red. " * 5
        text = f"{before}\n\n{heading}\n\n{burns}\n\n{heading.replace('lamp', 'door')}\n\n{after}"
        passages = check(text, Splitter(WORDS, max_tokens=64))
        assert [passage.heading for passage in passages] == ["", "The lamp", "The door"]
        assert passages[1].text == f"{heading}\n\n{burns}".strip()

    def test_a_short_section_is_joined_with_a_neighbour(self) -> None:
        long = "It burns oil and it never sleeps. " * 3
        text = f"# A\n\n## Lamp\n\n{long * 2}\n\n## Bell\n\nIt rings.\n\n## Ferry\n\n{long}\n\n## Crane\n\n{long}"
        passages = check(text, Splitter(WORDS, max_tokens=64))
        assert ["Bell" in passage.text for passage in passages] == [False, True, False]
        assert [passage.heading for passage in passages] == ["A > Lamp", "A > Ferry", "A > Crane"]

    def test_a_colon_goes_with_what_follows(self) -> None:
        text = "It stands on a tower.\n\nThe lamp burns:\n\n- walnut oil\n- in winter whale oil"
        assert texts_of(text, 12) == ["It stands on a tower.", "The lamp burns:\n\n- walnut oil\n- in winter whale oil"]

    def test_headings_under_each_other(self) -> None:
        text = "# Handbook\n\n## The lamp\nIt burns oil.\n\n# Last"
        passages = check(text, Splitter(WORDS, max_tokens=9))
        assert [passage.text for passage in passages] == ["# Handbook\n\n## The lamp\nIt burns oil.", "# Last"]
        assert [passage.heading for passage in passages] == ["Handbook > The lamp", "Last"]

    def test_levels_of_underlined_headings_are_in_order_of_appearance(self) -> None:
        chapters = ["====\nBook\n====", "Lamp\n----", "Oil\n~~~", "Bell\n----"]
        text = "\n\n".join(f"{title}\n\nOne two three four." for title in chapters)
        headings = [passage.heading for passage in check(text, Splitter(WORDS, max_tokens=9))]
        assert headings == ["Book", "Book > Lamp", "Book > Lamp > Oil", "Book > Bell"]

    def test_every_passage_of_a_section_has_its_heading(self) -> None:
        text = "# Lamp\n\nIt burns oil. It stands tall. It never sleeps. It is purple."
        passages = check(text, Splitter(WORDS, max_tokens=9))
        assert [passage.text for passage in passages] == [
            "# Lamp\n\nIt burns oil. It stands tall.",
            "It never sleeps. It is purple.",
        ]
        assert [passage.heading for passage in passages] == ["Lamp", "Lamp"]

    def test_a_heading_that_leaves_no_room_stands_alone(self) -> None:
        text = "# A heading of many words\n\nIt burns oil. It stands tall."
        assert texts_of(text, 7) == ["# A heading of many words", "It burns oil. It stands tall."]

    @pytest.mark.parametrize(
        "code",
        [
            "```\n# no heading\n\nmore\n====\n```",
            "~~~~ text\n# no heading\n~~~\n\n## none\n~~~~",
            "# a comment\n# in two lines",
            "    # indented\n\n    ## code",
        ],
    )
    def test_code_has_no_headings(self, code: str) -> None:
        text = f"# Lamp\n\nIt burns oil.\n\n{code}\n\nIt is purple."
        assert {passage.heading for passage in check(text, Splitter(WORDS, max_tokens=6))} == {"Lamp"}

    def test_a_table_is_cut_between_rows(self) -> None:
        rows = [f"| trade {row} of the lower town | {row} | 18{row:02} |" for row in range(40)]
        passages = texts_of("# Toll\n\n" + "\n".join(rows), 50)
        assert all(passage.endswith(" |") for passage in passages)
        assert len(passages) < 16

    @pytest.mark.parametrize("gap", ["\n\n", "\n"])
    def test_a_headword_goes_with_its_definition(self, gap: str) -> None:
        definition = "   A sorting algorithm\n   invented by Hoare.\n\n   It is quick."
        text = f"Quicksort{gap}{definition}\n\nquire{gap}   See {{choir}}.\n\nNot indented."
        passages = check(text, Splitter(WORDS, max_tokens=12))
        assert [passage.text for passage in passages] == [
            f"Quicksort{gap}{definition}",
            f"quire{gap}   See {{choir}}.",
            "Not indented.",
        ]
        assert [passage.heading for passage in passages] == ["Quicksort", "quire", ""]

    def test_one_entry_is_one_passage(self) -> None:
        assert len(texts_of("Quicksort\n\n   A sorting algorithm invented by Hoare.\n", 128)) == 1

    def test_no_sentence_is_a_headword(self) -> None:
        text = "The lamp burns walnut oil.\n\n    indented\n\nFor example:\n\n    code"
        assert {passage.heading for passage in check(text, Splitter(WORDS, max_tokens=4))} == {""}

    def test_a_word_beyond_the_limit_is_split(self) -> None:
        passages = check("x" * 50, Splitter(TINY, max_tokens=3))
        assert all(passage.end - passage.start >= 3 for passage in passages[:-1])

    def test_accents_and_joined_emoji_stay_whole(self) -> None:
        letters = "e\u0301👩‍👩‍👧👍🏽"
        passages = texts_of(letters * 20, 16, lambda text: len(text))
        assert all(passage[0] in "e👩👍" for passage in passages)

    def test_a_text_without_spaces_is_cut_between_sentences(self) -> None:
        text = "石橋は七人の石工が建てた。灯台守は油をともす。「山羊は乗れません。」と言った。" * 4
        passages = texts_of(text, 40, len)
        assert all(passage[-1] in "。」" for passage in passages)
        assert len(passages) < 6

    def test_time_grows_in_proportion_to_a_run_on_line(self) -> None:
        counted = []
        for words in (500, 4000):
            seen: list[int] = []
            splitter = Splitter(lambda text, seen=seen: seen.append(len(text)) or WORDS(text), max_tokens=32)  # type: ignore
            splitter.split("word " * words)
            counted.append(sum(seen))
        assert counted[1] < 9 * counted[0]

    def test_a_character_beyond_the_limit(self) -> None:
        with pytest.raises(InputError, match="'😀' alone has 4 tokens, more than reference_tokens"):
            Splitter(lambda text: len(text.encode()), max_tokens=3).split("a 😀")

    def test_half_a_character(self) -> None:
        with pytest.raises(InputError, match="surrogate"):
            Splitter(TINY).split("a \ud800")

    def test_a_limit_below_one(self) -> None:
        with pytest.raises(ConfigError, match="at least 1, not 0"):
            Splitter(TINY, max_tokens=0)

    @pytest.mark.real_model
    def test_the_handbook_of_the_demo(self, real_count: CountTokens) -> None:
        text = (Path(__file__).parents[2] / "m3runtime" / "cli" / "demo" / "handbook.md").read_text()
        passages = check(text, Splitter(real_count))
        # No two paragraphs fit together, no heading stands alone, and every sentence is whole.
        paragraphs = [part for part in text.split("\n\n") if part.strip() and not part.startswith("#")]
        assert len(passages) == len(paragraphs)
        assert all(passage.text.endswith(".") for passage in passages)
        assert all(passage.heading.startswith("Handbook of Brindolvar > ") for passage in passages)


@pytest.mark.real_model
class TestDictionary:
    """A dictionary in the form of FOLDOC: headwords at the margin, definitions indented, most of them references."""

    def test_no_headword_is_alone(self, real_count: CountTokens) -> None:
        passages = check(DICTIONARY.read_text(), Splitter(real_count))
        short = [passage.text for passage in passages if passage.tokens < 12]
        assert len(short) <= 0.05 * len(passages)
        assert all("\n\n   " in passage.text for passage in passages)

    def test_a_definition_is_found_by_its_headword(self, real_count: CountTokens, minilm_path: Path) -> None:
        text = DICTIONARY.read_text()
        entries = re.findall(r"(?m)^(\S.*)\n\n((?:   .+\n?)+)", text)
        defined = [(word, body.strip()) for word, body in entries if not body.startswith("   See ")][:120]
        assert (len(entries), len(defined)) == (370, 120)
        passages = Splitter(real_count).split(text)
        embedder = SentenceTransformersEmbedder(minilm_path)
        scores = (
            embedder.embed_queries([f"What is {word}?" for word, _ in defined])
            @ embedder.embed_references([passage.headed for passage in passages]).T
        )
        found = [
            [body in passages[place].text for place in row.argsort()[:-6:-1]]
            for (_, body), row in zip(defined, scores, strict=True)
        ]
        assert sum(places[0] for places in found) >= 60
        assert sum(map(any, found)) >= 95


@pytest.fixture(scope="session")
def real_count(smollm2_path: Path) -> CountTokens:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
