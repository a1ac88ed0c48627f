import json
import os
import resource
import string
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer

from m3runtime.documents.html import html_text
from m3runtime.documents.reading import Document, find_files, read_documents
from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.splitting import CountTokens, Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.errors import ConfigError, InputError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sources(root: Path, *paths: Path) -> list[str]:
    return [Path(document.source).relative_to(root).as_posix() for document in read_documents(paths)]


class TestReading:
    @pytest.mark.parametrize("suffix", ["txt", "md", "rst", "TXT"])
    def test_text_as_it_is(self, tmp_path: Path, suffix: str) -> None:
        path = write(tmp_path / f"a.{suffix}", "# Ünï\r\ncode 😀\r\n\rend ")
        assert list(read_documents([path])) == [Document(str(path), "# Ünï\ncode 😀\n\nend ")]

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", b"\xef\xbb\xbfword")
        assert next(read_documents([path])).text == "word"

    def test_folders_are_walked_in_order(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a/z.md", "a/b/c.rst", "a.txt", "c/x.html", "c/y.htm"):
            write(tmp_path / name, "text")
        expected = ["a/b/c.rst", "a/z.md", "a.txt", "b.txt", "c/x.html", "c/y.htm"]
        assert sources(tmp_path, tmp_path) == expected
        assert sources(tmp_path, str(tmp_path)) == expected  # type: ignore[arg-type]

    def test_a_source_is_the_path_as_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "docs" / "a.txt", "text")
        monkeypatch.chdir(tmp_path)
        assert [document.source for document in read_documents(["docs"])] == ["docs/a.txt"]
        assert [document.source for document in read_documents(["./docs/a.txt"])] == ["docs/a.txt"]

    def test_what_is_not_read_is_named(self, tmp_path: Path) -> None:
        for name in ("a.txt", "picture.png", ".hidden.txt", ".git/b.txt", "no-suffix"):
            write(tmp_path / name, "text")
        files, skipped = find_files([tmp_path])
        assert [path.name for path in files] == ["a.txt"]
        assert [path.name for path in skipped] == [".hidden.txt", "no-suffix", "picture.png"]

    def test_a_file_of_any_suffix_is_read_when_it_is_named(self, tmp_path: Path) -> None:
        path = write(tmp_path / "LICENSE", "text")
        assert sources(tmp_path, path) == ["LICENSE"]

    def test_each_file_once(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", "text")
        (tmp_path / "link.txt").symlink_to(path)
        assert sources(tmp_path, path, tmp_path, tmp_path / "link.txt") == ["a.txt"]

    def test_links_that_go_round(self, tmp_path: Path) -> None:
        write(tmp_path / "a" / "a.txt", "text")
        (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "a" / "self").symlink_to("self")
        assert sources(tmp_path, tmp_path) == ["a/a.txt"]

    def test_a_link_to_a_folder_elsewhere(self, tmp_path: Path) -> None:
        write(tmp_path / "elsewhere" / "a.txt", "text")
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        assert sources(tmp_path, tmp_path / "corpus") == ["corpus/link/a.txt"]

    def test_json_lines(self, tmp_path: Path) -> None:
        lines = [
            {"text": "one"},
            {"text": "two\r\nlines", "id": 7},
            {"text": "three", "id": 8, "source": "manual"},
            {"text": "  "},
        ]
        path = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\n\n")
        assert list(read_documents([path])) == [
            Document(str(path), "one", {"record": "1"}),
            Document(str(path), "two\nlines", {"record": "7"}),
            Document(str(path), "three", {"record": "manual"}),
        ]

    def test_json_lines_with_another_field(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"body": "one"}')
        assert [document.text for document in read_documents([path], text_field="body")] == ["one"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "is not JSON"),
            ("[" * 100_000, "is not JSON"),
            ("[]", "not an object with a text in 'text'"),
            ('{"body": "x"}', "not an object with a text in 'text'"),
            ('{"text": 3}', "not an object with a text in 'text'"),
            ('{"text": "\\ud800"}', "surrogate"),
        ],
    )
    def test_a_bad_line_of_json(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
        with pytest.raises(InputError, match=message) as caught:
            list(read_documents([path]))
        assert f"{path}, line 2" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"\x89PNG\r\n\x1a\n\0\0", "is a binary file"),
            (b"a\0b", "is a binary file"),
            (
                "Zwölf".encode("latin-1"),
                r"is a binary file, or text in another encoding than UTF-8 \(byte 2\)",
            ),
            ("word".encode("utf-16"), "is text in UTF-16; convert it to UTF-8"),
            ("word".encode("utf-32"), "is text in UTF-32; convert it to UTF-8"),
        ],
    )
    @pytest.mark.parametrize("name", ["a.txt", "a.html"])
    def test_files_that_are_not_text(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        path = write(tmp_path / name, content)
        with pytest.raises(InputError, match=message) as caught:
            list(read_documents([path]))
        assert str(path) in str(caught.value)

    def test_a_missing_path_is_an_error_at_once(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", "text")
        with pytest.raises(InputError, match="gone is neither a file nor a folder"):
            read_documents([tmp_path, tmp_path / "gone"])

    def test_a_folder_without_text(self, tmp_path: Path) -> None:
        write(tmp_path / "picture.png", "x")
        with pytest.raises(InputError, match=f"{tmp_path.name} holds no text"):
            read_documents([tmp_path])

    def test_blank_files(self, tmp_path: Path) -> None:
        blank, full = write(tmp_path / "a.txt", " \n\t"), write(tmp_path / "b.txt", "text")
        assert sources(tmp_path, blank, full) == ["b.txt"]
        with pytest.raises(InputError, match=r"there is no text in .*a\.txt"):
            list(read_documents([blank]))
        with pytest.raises(InputError, match="no files"):
            list(read_documents([]))

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", "text")
        path.chmod(0)
        with pytest.raises(InputError, match="cannot be read"):
            list(read_documents([path]))


class TestLongFiles:
    """Files that are longer than what is read at a time."""

    TEXT = "Zwölf 😀 Boxkämpfer\r\njagen Viktor.\r\r" * 60_000

    def test_the_text_is_that_of_the_whole_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", "\ufeff" + self.TEXT)
        (document,) = read_documents([path])
        blocks = list(document.blocks())
        assert len(blocks) > 2
        assert max(map(len, blocks)) <= 1 << 20
        assert "".join(blocks) == document.text == self.TEXT.replace("\r\n", "\n").replace("\r", "\n")
        assert document.source == str(path)

    @pytest.mark.parametrize(
        ("end", "message"),
        [
            (b"\xe4 ", r"another encoding than UTF-8 \(byte 2400000\)"),
            ("ö".encode()[:1], r"another encoding than UTF-8 \(byte 2400000\)"),
            (b"\0", "is a binary file"),
        ],
    )
    def test_a_mistake_near_the_end(self, tmp_path: Path, end: bytes, message: str) -> None:
        path = write(tmp_path / "a.txt", b"A heron nests in. \r\n\r\n  " * 100_000)
        content = path.read_bytes()[:2_400_000]
        write(path, content + end)
        with pytest.raises(InputError, match=message):
            list(next(read_documents([path])).blocks())

    def test_references_are_those_of_the_whole_text(self, tmp_path: Path) -> None:
        text = "\n\n".join(f"# House {n}\n\nThe lamp of house {n} burns oil. 😀" for n in range(40_000))
        path = write(tmp_path / "a.md", text)
        splitter = Splitter(WORDS, max_tokens=24)
        with closing(ReferenceSpool(read_documents([path]), splitter)) as references:
            assert len(references) == 40_000
            for one, passage in zip(references, splitter.split(text, path.as_posix()), strict=True):
                assert one == passage
                assert text[one.start : one.end] == one.text
            assert references[39_999].text.startswith("# House 39999")


class TestReferences:
    @given(
        st.lists(st.sampled_from(["one two", "three four\n\none two", "five\0 six", "東京"]), min_size=1, max_size=6)
    )
    def test_each_text_once_in_order(self, texts: list[str]) -> None:
        documents = [Document(f"\udcff{number}", text) for number, text in enumerate(texts)]
        expected = dict.fromkeys(piece for text in texts for piece in text.split("\n\n"))
        with closing(ReferenceSpool(iter(documents), Splitter(WORDS))) as references:
            assert references.documents == len(texts)
            assert [one.text for one in references] == list(expected)
            assert [references[place].text for place in range(len(references))] == list(expected)
            assert all(one.text in documents[int(one.source[1:])].text for one in references)
            with pytest.raises(IndexError):
                references[len(references)]

    def test_nothing_of_it_is_left(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
        documents = (Document(f"{n}", " ".join(f"w{n}x{m}" for m in range(100))) for n in range(30_000))
        with closing(ReferenceSpool(documents, Splitter(WORDS))) as references:
            assert len(references) == 30_000
            assert not list(tmp_path.iterdir())  # without a name from the beginning, so that a kill leaves nothing

    def test_a_folder_without_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        documents = (Document(f"{n}", " ".join(f"w{n}x{m}" for m in range(100))) for n in range(100_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(InputError, match="do not fit in a temporary file"):
                ReferenceSpool(documents, Splitter(WORDS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestHtml:
    @pytest.mark.parametrize(
        ("markup", "text"),
        [
            ("<p>one</p><p>two</p>", "one\n\ntwo"),
            ("<p>a <b>b</b>c,\n   d</p>", "a bc, d"),
            ("a<br>b<br/>c", "a\nb\nc"),
            ("<h1> The <i>lamp</i></h1><h3>Oil</h3>text", "# The lamp\n\n### Oil\n\ntext"),
            ("<h2></h2><h2> </h2>text", "text"),
            ("<head><title>no</title></head><style>p{}</style>yes<script>no</script><!-- no -->", "yes"),
            ("<ul>\n <li>one</li>\n <li> two</li></ul>", "one\n\ntwo"),
            ("<table><tr><th>a</th><td>b</td></tr><tr><td>c</td></tr></table>", "a b\n\nc"),
            ("x<pre>\n  if a:\n\n      b\n</pre>y", "x\n\n  if a:\n\n      b\n\ny"),
            ("&lt;p&gt; &amp; &eacute;&#128512;", "<p> & é😀"),
            ("<?xml version='1.0'?><!DOCTYPE html><p>one", "one"),
            ("index.html", "index.html"),
            ("<p>never <b>closed<p>next", "never closed\n\nnext"),
            ("", ""),
        ],
    )
    def test_text_of(self, markup: str, text: str) -> None:
        assert html_text(markup) == text

    def test_deep_and_long_markup(self) -> None:
        assert html_text("<div>" * 2_000 + "x") == "x"
        assert html_text("<p>x</p>\n" * 5_000).count("\n\n") == 4_999

    @given(st.text(st.sampled_from("<>/!-&;#\"' \nphbr1")))
    def test_any_markup_gives_some_text(self, markup: str) -> None:
        text = html_text(markup)
        assert text == text.strip()

    def test_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.html", "<h1>Ä</h1>\r\n<p>b")
        assert list(read_documents([path])) == [Document(str(path), "# Ä\n\nb")]


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

    @given(
        st.lists(st.sampled_from(["# Lamp", "One two three.", "four:", "Five\n----", "six \nseven", " "]), max_size=20)
    )
    def test_text_in_short_sections_is_split_as_if_at_once(self, paragraphs: list[str]) -> None:
        paragraphs = [part for pair in zip(paragraphs, ["Eight nine."] * len(paragraphs), strict=True) for part in pair]
        text = "\n \n".join(paragraphs)
        assert Splitter(WORDS, max_tokens=4, longest=40).split(text) == Splitter(WORDS, max_tokens=4).split(text)

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

    def test_a_paragraph_begins_a_passage(self) -> None:
        text = "The lamp is purple.\n\nThe ferry is slow.\n\nThe bread is flat."
        assert len(check(text, Splitter(WORDS, max_tokens=8))) == 3

    @pytest.mark.parametrize("heading", ["## The lamp", "The lamp\n========", "The lamp\n~~~", "The lamp:"])
    def test_a_heading_goes_with_what_follows(self, heading: str) -> None:
        text = f"Before.\n\n{heading}\n\nIt burns oil.\n\nAfter."
        pieces = [passage.text for passage in check(text, Splitter(WORDS))]
        assert pieces == ["Before.", f"{heading}\n\nIt burns oil.", "After."]

    def test_headings_under_each_other(self) -> None:
        text = "# Handbook\n\n## The lamp\n\nIt burns oil.\n\n# Last"
        pieces = [passage.text for passage in check(text, Splitter(WORDS))]
        assert pieces == ["# Handbook\n\n## The lamp\n\nIt burns oil.", "# Last"]

    def test_a_heading_goes_with_the_beginning_of_a_long_paragraph(self) -> None:
        text = "# Lamp\n\nIt burns oil. It stands tall. It never sleeps. It is purple."
        pieces = [passage.text for passage in check(text, Splitter(WORDS, max_tokens=9))]
        assert pieces == ["# Lamp\n\nIt burns oil. It stands tall.", "It never sleeps. It is purple."]

    def test_a_heading_that_leaves_no_room_stands_alone(self) -> None:
        text = "# A heading of many words\n\nIt burns oil. It stands tall."
        pieces = [passage.text for passage in check(text, Splitter(WORDS, max_tokens=7))]
        assert pieces == ["# A heading of many words", "It burns oil. It stands tall."]

    def test_a_word_beyond_the_limit_is_split(self) -> None:
        passages = check("x" * 50, Splitter(TINY, max_tokens=3))
        assert [passage.end - passage.start for passage in passages[:4]] == [12, 12, 12, 12]

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
        text = (Path(__file__).parents[2] / "docs" / "demo" / "handbook.md").read_text()
        passages = check(text, Splitter(real_count))
        # One for each paragraph, none for a heading alone, and every sentence whole.
        paragraphs = [part for part in text.split("\n\n") if part.strip() and not part.startswith("#")]
        assert len(passages) == len(paragraphs)
        assert all(passage.text.endswith(".") for passage in passages)


@pytest.fixture(scope="session")
def real_count(smollm2_path: Path) -> CountTokens:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)
