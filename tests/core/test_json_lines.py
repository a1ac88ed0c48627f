"""Fields of JSON lines: text, id, title, address and metadata."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from m3runtime.cli.citing import cited
from m3runtime.config.schema import Config, DocumentsConfig
from m3runtime.documents.document import Document
from m3runtime.documents.reading import read_documents
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.errors import ConfigError, InputError

RYE = "The mill of Harrowfen grinds rye."


def read(folder: Path, *lines: Any, **fields: Any) -> list[Document]:
    path = folder / "a.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return list(read_documents([path], fields=DocumentsConfig(**fields)))


def test_all_fields(tmp_path: Path) -> None:
    line = {
        "doc": {"body": RYE, "no": 7},
        "name": "The mill",
        "link": "https://example.org/mill",
        "meta": {"lang": "en", "tags": ["rye", "wind"]},
        "year": 1884,
        "draft": None,
    }
    (one,) = read(
        tmp_path,
        line,
        text_field="doc.body",
        id_field="doc.no",
        title_field="name",
        url_field="link",
        metadata_fields=("meta.lang", "meta.tags", "year", "draft", "absent"),
    )
    assert one.text == f"# The mill\n\n{RYE}"
    assert one.metadata == {
        "record": "7",
        "title": "The mill",
        "url": "https://example.org/mill",
        "meta.lang": "en",
        "meta.tags": '["rye", "wind"]',
        "year": "1884",
    }


def test_a_field_may_have_a_dot_in_its_own_name(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {"doc.body": RYE}, text_field="doc.body")
    assert one.text == RYE


@pytest.mark.parametrize("text", [f"The mill\n\n{RYE}", f"# The mill\n\n{RYE}"])
def test_a_text_that_begins_with_its_title_gets_no_other(tmp_path: Path, text: str) -> None:
    (one,) = read(tmp_path, {"title": " The  mill", "text": text})
    assert one.text == text


def test_fields_are_cited(tmp_path: Path) -> None:
    documents = read(tmp_path, {"id": "mill", "title": "Mill", "url": "https://a.b/c", "text": RYE})
    with closing(ReferenceSpool(documents, Splitter(lambda text: len(text.split())))) as spool:
        (one,) = spool
    assert cited(one).startswith(f"{tmp_path / 'a.jsonl'}:mill, url https://a.b/c")


def test_blank_texts_are_passed_over(tmp_path: Path) -> None:
    assert [one.text for one in read(tmp_path, {"text": ""}, {"text": RYE}, {"text": " "})] == [RYE]


def test_an_id_field_that_a_line_lacks_gives_its_number(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {"text": RYE, "id": 3}, id_field="key")
    assert one.metadata == {"record": "1"}


def test_long_numbers_and_values(tmp_path: Path) -> None:
    (one,) = read(tmp_path, f'{{"n": {"9" * 5000}, "x": NaN, "text": "{RYE}"}}', metadata_fields=("n",))
    assert len(one.metadata["n"]) == 2000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[\n{}\n]", "line 1 is not JSON: .*; a record must be one line"),
        ('{\n  "text": "a b"\n}', "line 1 is not JSON: .*; a record must be one line"),
        ('{"text": "a b",}', "line 1 is not JSON"),
        ('{"text": null}', "line 1 is not an object with a text in 'text'"),
        ('{"text": 1884}', "line 1 is not an object with a text in 'text'"),
        ('{"content": "a b"}', "line 1 is not an object with a text in 'text'"),
        ('{"text": "a b", "title": "\\ud83d"}', "line 1: 'title' has half a character"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)


def test_the_file_may_be_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{RYE} 😀"}}\n', "utf-16")
    assert [one.text for one in read_documents([tmp_path / "a.jsonl"])] == [f"{RYE} 😀"]


def test_a_name_with_a_meaning_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m3.yaml").write_text(
        "{bank: ./bank, model: {path: x}, embedder: {path: y}, documents: {metadata_fields: [record]}}"
    )
    with pytest.raises(ConfigError, match="metadata_fields must not have record"):
        Config.load(tmp_path / "m3.yaml", environ={})
