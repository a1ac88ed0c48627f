import base64
import json
import os
import resource
import socket
import textwrap
from contextlib import chdir, closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.config.schema import DocumentsConfig
from m3runtime.documents.document import Document
from m3runtime.documents.embedded import without_embedded
from m3runtime.documents.html import html_text
from m3runtime.documents.reading import find_files, read_documents, read_file
from m3runtime.documents.splitting import CountTokens, Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.documents.text import text_blocks
from m3runtime.errors import InputError

BYTES = base64.b64encode(bytes(range(256)) * 2).decode()
RUNS = ["data:image/gif;base64,R0lGODlhAQABAIA=", BYTES, f"data:image/png;base64,{BYTES}"]
RUNS.append("\n".join(textwrap.wrap(BYTES, 76)))
"""Texts that are left out."""
WORDS: CountTokens = lambda text: len(text.split())  # noqa: E731 - as short as it is clear


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

    @pytest.mark.parametrize(
        ("encoding", "text"),
        [
            ("utf-8-sig", "Zwölf 😀"),
            ("utf-16", "Zwölf 😀"),
            ("utf-32", "Zwölf 😀"),
            ("gb18030", "哈罗芬的石桥建于一八八四年。"),
            ("shift_jis", "石橋は千八百八十四年に建てられた。"),
            ("euc_jp", "灯台守は油をともす。渡し船は六時に出る。カタカナもある。"),
            ("big5", "石橋建於一八八四年,渡船每天六點離開村莊。"),
            ("cp949", "돌다리는 1884년에 지어졌다."),
            ("latin-1", "Le café de Harrowfen ouvre à sept heures."),
            ("cp1252", "The keeper’s “blue” lantern."),
            ("cp1250", "Most zbudował ślusarz ze Szczecina, żółty dźwig."),
            ("cp1251", "Каменный мост построен в 1884 году."),
            ("koi8_r", "Каменный мост построен в 1884 году."),
            ("cp1253", "Λάμπα και γέφυρα χτίστηκαν το 1884."),
        ],
    )
    @pytest.mark.parametrize("before", [0, 1_200_000], ids=["short", "long"])
    def test_an_encoding_is_found_out(self, tmp_path: Path, encoding: str, text: str, before: int) -> None:
        text = "a heron. " * (before // 9) + text  # the first block of a long one tells nothing
        path = write(tmp_path / "a.txt", text.encode(encoding))
        assert next(read_documents([path])).text == text

    @pytest.mark.parametrize("encoding", ["shift_jis", "iso2022_jp", "utf-8"])
    def test_html_declares_its_encoding(self, tmp_path: Path, encoding: str) -> None:
        path = write(tmp_path / "a.html", f"<meta charset={encoding}><p>石橋".encode(encoding))
        assert next(read_documents([path])).text == "石橋"

    def test_utf_8_is_believed_before_a_declaration(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.html", "<meta charset=iso-8859-1><p>Zwölf")
        assert next(read_documents([path])).text == "Zwölf"

    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")), st.integers(1, 5))
    def test_utf_8_is_never_taken_for_another_encoding(self, text: str, size: int) -> None:
        content = text.encode()
        blocks = [content[at : at + size] for at in range(0, len(content), size)]
        assert "".join(text_blocks(blocks, "a")) == text.removeprefix("\ufeff")

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

    def test_what_is_no_file_is_passed_over_and_named(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", "text")
        os.mkfifo(tmp_path / "pipe.txt")
        (tmp_path / "self.txt").symlink_to("self.txt")
        (tmp_path / "nowhere.md").symlink_to("nothing")
        (tmp_path / "null.txt").symlink_to("/dev/null")
        with closing(socket.socket(socket.AF_UNIX)) as ear, chdir(tmp_path):
            ear.bind("socket.txt")
        files, skipped = find_files([tmp_path])
        assert [path.name for path in files] == ["a.txt"]
        names = ["nowhere.md", "null.txt", "pipe.txt", "self.txt", "socket.txt"]
        assert [path.name for path in skipped] == names
        for name in names:
            with pytest.raises(InputError, match=f"{name} is neither a file nor a folder"):
                find_files([tmp_path / name])

    def test_a_record_that_cannot_be_read_is_passed_over_where_that_is_asked_for(self, tmp_path: Path) -> None:
        lines = [b'{"text": "one"}', b"{", b'{"text": null}', b"\xff", b'{"text": "\\ud800"}', b'{"text": "two"}']
        path = write(tmp_path / "a.jsonl", b"\n".join(lines))
        unread: list[InputError] = []
        documents = read_file(path, "a", unread=unread.append)
        assert [document.text for document in documents] == ["one", "two"]
        assert [str(error).split(f"{path}, line ")[1][0] for error in unread] == ["2", "3", "4", "5"]
        with pytest.raises(InputError, match="line 2 is not JSON"):
            list(read_file(path, "a"))

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
        assert [document.text for document in read_documents([path], fields=DocumentsConfig(text_field="body"))] == [
            "one"
        ]

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
            ("word".encode("utf-16-le"), "is a binary file"),
            ("word".encode("utf-16") + b"x", "damaged text: byte 10 is not UTF-16"),
            ("Zwölf Boxkämpfer ".encode() + b"\xe4 ", "damaged text: byte 19 is not UTF-8"),
            (bytes(range(128, 256)) * 40, "in an unknown encoding; convert it to UTF-8"),
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
            ("öä".encode() + b"\xe4 ", "byte 2400004 is not UTF-8"),
            ("ö".encode()[:1], "byte 2400000 is not UTF-8"),
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
        words = " ".join(["lamplighters'-candlestick"] * 14)
        text = "\n\n".join(f"# House {n}\n\nThe lamp of house {n} burns {words}. 😀" for n in range(6_000))
        path = write(tmp_path / "a.md", text)
        splitter = Splitter(WORDS, max_tokens=24)
        with closing(ReferenceSpool(read_documents([path]), splitter)) as references:
            assert len(references) == 6_000
            for one, passage in zip(references, splitter.split(text, path.as_posix()), strict=True):
                assert one == passage
                assert text[one.start : one.end] == one.text
            assert references[5_999].text.startswith("# House 5999")


class TestEmbedded:
    """Pictures and files that stand in a text as base64."""

    @given(st.lists(st.sampled_from(["The lamp ", "burns.\n", *RUNS])), st.lists(st.integers(0, 3000), max_size=6))
    def test_they_are_left_out_wherever_the_text_is_cut(self, parts: list[str], cuts: list[int]) -> None:
        text = "| ".join(parts)
        ends = [0, *sorted(cuts), len(text)]
        left_out: list[tuple[int, int]] = []
        blocks = (text[a:b] for a, b in pairwise(ends))
        kept = "".join(without_embedded(blocks, lambda *run: left_out.append(run)))
        assert kept == "| ".join("" if part in RUNS else part for part in parts)
        assert sum(length for _, length in left_out) + len(kept) == len(text)
        assert len(left_out) == sum(part in RUNS for part in parts)

    @pytest.mark.parametrize(
        "text",
        [
            "ACGT" * 500,
            "a" * 10_000,
            "0123456789abcdef" * 100,
            "word\n" * 500,
            "https://heron.example/a/B/1?" + "x=1&" * 100,
            "石橋" * 500,
            "Aa1" * 80,
            ("ACGT" * 15 + "\n") * 9,
        ],
    )
    def test_other_long_words_stay(self, text: str) -> None:
        assert "".join(without_embedded([text])) == text

    def test_a_document_says_where(self) -> None:
        left_out: list[tuple[int, int]] = []
        document = Document("a.md", f"# Lamp\n\n![lamp]({RUNS[2]})\n\nIt burns.")
        assert "".join(document.blocks(lambda *run: left_out.append(run))) == "# Lamp\n\n![lamp]()\n\nIt burns."
        assert left_out == [(16, len(RUNS[2]))]


class TestReferences:
    @given(
        st.lists(st.sampled_from(["one two", "three four\n\none two", "five\0 six", "東京"]), min_size=1, max_size=6)
    )
    def test_each_text_once_in_order(self, texts: list[str]) -> None:
        documents = [Document(f"\udcff{number}", text) for number, text in enumerate(texts)]
        expected = dict.fromkeys(piece for text in texts for piece in text.split("\n\n"))
        with closing(ReferenceSpool(iter(documents), Splitter(WORDS, max_tokens=3))) as references:
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
            ("<head><title>Lamps</title></head><style>p{}</style>yes<script>no</script><!-- no -->", "# Lamps\n\nyes"),
            ("<title>no</title><h1>Lamp</h1>yes", "# Lamp\n\nyes"),
            ("<html><head><title>Lamps</title><body><p>no end of the head</html>", "# Lamps\n\nno end of the head"),
            (
                "a<ul>\n <li>one</li>\n <li> two<ol><li><p>x</p><p>y</p><li>z</ol></li><li></ul>b",
                "a\n\n- one\n- two\n\n  1. x\n\n     y\n\n  2. z\n\nb",
            ),
            ("<table><tr><th>a</th><td><p>b</p></td></tr><tr><td>c<td></tr><tr><td></table>", "| a | b |\n| c |  |"),
            ("x<pre>\n  if a:\n\n      b\n</pre>y", "x\n\n```\n  if a:\n\n      b\n```\n\ny"),
            ("<pre># one   line</pre>", "# one   line"),
            (
                "<dl><dt>Quicksort<dd>By Hoare.<p>Quick.<dt>-q<dt>--quiet<dd>Less.</dl>x",
                "Quicksort\n    By Hoare.\n\n    Quick.\n\n-q\n\n--quiet\n    Less.\n\nx",
            ),
            ("<ul><li><h2>Lamp</h2>Oil</ul>", "- ## Lamp\n\n  Oil"),
            ("<table><tr><td><h2>Lamp</h2>Oil<td>Bell</table>", "## Lamp\n\nOil\n\nBell"),
            ("<p>a <img src=x alt='four  pence'> b", "a four pence b"),
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
