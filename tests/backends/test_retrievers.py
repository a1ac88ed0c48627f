"""Retrievers of LangChain and LlamaIndex find what the runtime finds, by the libraries themselves."""

from collections.abc import Iterator
from typing import Any

import pytest

from m3runtime.documents.reference import Place
from m3runtime.errors import InputError
from m3runtime.runtime import Runtime
from m3runtime.storage.home import Changes
from tests.core.recalling import TEXTS, open_runtime


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with open_runtime(tmp_path_factory.mktemp("retrievers") / "bank", min_score=0.5) as opened:
        places = {
            id: (Place(f"docs/{id % 3}.md", 4, 9, {"lang": "en" if id % 2 else "de", "page": "7"}),)
            for id in range(len(TEXTS))
        }
        opened.bank.home.change(Changes(places=places))
        yield opened


def langchain(runtime: Runtime, text: str, **options: Any) -> list[tuple[str, str, dict[str, Any]]]:
    retrievers = pytest.importorskip("m3backends.retrievers.langchain", exc_type=ImportError)
    found = retrievers.MemoryRetriever(runtime=runtime, **options).invoke(text)
    return [(one.id, one.page_content, one.metadata) for one in found]


def llama_index(runtime: Runtime, text: str, **options: Any) -> list[tuple[str, str, dict[str, Any]]]:
    retrievers = pytest.importorskip("m3backends.retrievers.llama_index", exc_type=ImportError)
    found = retrievers.MemoryRetriever(runtime, **options).retrieve(text)
    assert [one.score for one in found] == [one.node.metadata["score"] for one in found]
    return [(one.node.node_id, one.node.text, one.node.metadata) for one in found]


each = pytest.mark.parametrize("retrieve", [langchain, llama_index])


@each
def test_it_finds_what_the_runtime_finds(runtime: Runtime, retrieve: Any) -> None:
    (matches,) = runtime.search(["lamp oil"])
    found = retrieve(runtime, "lamp oil")
    assert matches
    assert [id for id, _, _ in found] == [str(match.id) for match in matches]
    assert [text for _, text, _ in found] == [TEXTS[match.id] for match in matches]
    assert [data["score"] for _, _, data in found] == [match.score for match in matches]
    first = found[0][2]
    assert (first["source"], first["start"], first["page"]) == (f"docs/{matches[0].id % 3}.md", 4, "7")
    assert len(retrieve(runtime, "lamp oil", k=7)) == 7
    assert retrieve(runtime, "zebra") == []


@each
def test_it_is_filtered(runtime: Runtime, retrieve: Any) -> None:
    found = retrieve(runtime, "lamp oil", k=99, where={"lang": "en", "source": ["docs/1.md"]})
    assert {int(id) for id, _, _ in found} == {id for id in range(len(TEXTS)) if id % 2 and id % 3 == 1}
    with pytest.raises(InputError, match="at_least"):
        retrieve(runtime, "lamp oil", where={"lang": {"above": 1}})
