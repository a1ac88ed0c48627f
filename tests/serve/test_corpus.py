"""The corpus over HTTP: what is added is found by the next request, and what is forgotten by none."""

import io
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest
from filelock import FileLock

from m3runtime.config.schema import Config
from m3runtime.serve.changes import Changes
from m3runtime.serve.uploads import Uploads
from tests.core import office
from tests.end_to_end.commands import FACTS, Place
from tests.end_to_end.conftest import model_path, new_place, nursery, written, written_once  # noqa: F401 - fixtures
from tests.end_to_end.nursery import Nursery
from tests.serve.corpus_server import Client, changers, error, serving

pytest.importorskip("fastapi")
KEYS = "read reader-key, write writer-key, read narrow-key facts/ferry.md facts/wall.html"
NOTE = "The weathercock of Pellworm turns to the north before a storm.\n"


@pytest.fixture(scope="module")
def shared(written_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:  # noqa: F811
    """A server whose bank stays as it is."""
    with serving(written_once.file, serve__upload="200KiB", serve__body="50KiB") as url, Client.of(url) as client:
        yield client


@dataclass(frozen=True)
class Changing:
    """A server whose bank changes, and its clients."""

    place: Place
    url: str
    writer: Client


@pytest.fixture(scope="module")
def changing(written_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changing]:  # noqa: F811
    """One server for many tests: the process that changes a bank takes seconds to start."""
    folder = tmp_path_factory.mktemp("changing") / "place"
    shutil.copytree(written_once.folder, folder)
    Place(folder).configure(bank="../place/bank")
    (folder.parent / "outside.md").write_text("A cairn outside of the folder points to Pellworm.\n")
    assert Place(folder).m3("write", "../outside.md").code == 0
    with serving(folder / "m3.yaml", KEYS, start="spawn") as url, Client.of(url, "writer-key") as writer:
        yield Changing(Place(folder), url, writer)


class TestReading:
    def test_sources_come_in_pages(self, shared: Client) -> None:
        first = shared.sources(limit=2)
        second = shared.sources(limit=100, after=first["data"][-1]["id"])
        assert (first["has_more"], second["has_more"], first["total"]) == (True, False, len(FACTS))
        names = [one["id"] for one in (*first["data"], *second["data"])]
        assert names == sorted(f"facts/{name}" for name in FACTS)
        assert {one["id"]: one["references"] for one in second["data"]}["facts/wall.html"] == 1

    def test_sources_are_filtered_by_name(self, shared: Client) -> None:
        assert [one["id"] for one in shared.sources(contains="BIRDS")["data"]] == ["facts/birds.jsonl"]

    def test_a_search_gives_references_that_can_be_read(self, shared: Client) -> None:
        (best, *_) = shared.found("the crossing of the ferry to Brannoch")
        assert best["source"] == "facts/ferry.md"
        read = shared.http.get(f"/v1/corpus/references/{best['id']}").json()
        assert read["text"] == best["text"]
        assert "55 minutes" in read["text"]
        assert read["places"][0]["source"] == "facts/ferry.md"

    @pytest.mark.parametrize("id", [999_999, (1 << 63) - 1])
    def test_an_unknown_reference(self, shared: Client, id: int) -> None:
        error(shared.http.get(f"/v1/corpus/references/{id}"), 404)

    @pytest.mark.parametrize("id", ["-1", "x", str(1 << 63), "1e9"])
    def test_what_is_no_id(self, shared: Client, id: str) -> None:
        error(shared.http.get(f"/v1/corpus/references/{id}"), 400)

    @pytest.mark.parametrize(
        "asked", [{}, {"query": ""}, {"query": "x", "k": 0}, {"query": "x", "k": 101}, {"query": "x", "sauce": 1}]
    )
    def test_what_is_no_search(self, shared: Client, asked: dict[str, object]) -> None:
        error(shared.http.post("/v1/corpus/search", json=asked), 400)

    def test_a_search_in_some_sources(self, shared: Client) -> None:
        asked = {"query": "the ferry to Brannoch", "k": 5, "sources": ["facts/wall.html", "facts/none.md"]}
        found = shared.http.post("/v1/corpus/search", json=asked).json()["data"]
        assert [one["source"] for one in found] == ["facts/wall.html"]

    def test_a_blank_search_finds_nothing(self, shared: Client) -> None:
        assert shared.found("   ") == []

    def test_the_observation_tells_of_tiers(self, shared: Client) -> None:
        seen = shared.http.get("/v1/observe").json()
        assert seen["memories"] == len(FACTS) + 1  # birds.jsonl has two
        assert [tier["name"] for tier in seen["tiers"]] == ["pinned", "lmdb"]
        assert {"chunks", "memories", "kept", "phases"} <= seen["recall"].keys()


class TestRefusal:
    @pytest.mark.parametrize(
        "name",
        [
            "../../etc/cron.md",
            "/etc/passwd.txt",
            "a\\b.txt",
            ".hidden.md",
            "..",
            "x" * 300 + ".txt",
            "c:x.txt",
            "a\x01.md",
            "a\x85b.md",
            "\u202edm.exe.md",
        ],
    )
    def test_names_that_are_paths(self, shared: Client, name: str) -> None:
        assert "name" in error(shared.text(name, NOTE), 400)

    def test_a_path_in_an_upload(self, shared: Client) -> None:
        error(shared.upload("../../evil.md", NOTE.encode()), 400)

    @pytest.mark.parametrize("name", ["a.exe", "noend", "a.zip", "a.md.gz"])
    def test_other_types(self, shared: Client, name: str) -> None:
        assert ".pdf" in error(shared.upload(name, NOTE.encode()), 415)

    def test_an_empty_file(self, shared: Client) -> None:
        assert error(shared.upload("empty.md", b""), 400) == "empty.md is empty"

    def test_too_much(self, shared: Client) -> None:
        error(shared.upload("long.txt", b"word " * 100_000), 413)

    def test_too_much_in_pieces_of_unknown_number(self, shared: Client) -> None:
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n\r\n'
        pieces = (head if not number else b"x" * 10_000 for number in range(100))
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        error(shared.http.post("/v1/corpus/documents", content=pieces, headers=headers), 413)

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"name": "a.md"}', b'{"name": 3, "text": "x"}', b"[" * 9000])
    def test_what_is_no_document(self, shared: Client, body: bytes) -> None:
        error(shared.http.post("/v1/corpus/documents", content=body, headers={"Content-Type": "application/json"}), 400)

    def test_unknown_fields_and_half_characters(self, shared: Client) -> None:
        document = {"name": "a.md", "text": "x", "tags": []}
        assert "tags" in error(shared.http.post("/v1/corpus/documents", json=document), 400)
        content = b'{"name": "a.md", "text": "\\ud800"}'
        json_type = {"Content-Type": "application/json"}
        error(shared.http.post("/v1/corpus/documents", content=content, headers=json_type), 400)
        error(shared.text("a.md", "NUL \0 in it"), 400)

    def test_unknown_fields_of_forms_and_queries(self, shared: Client) -> None:
        documents, sources = "/v1/corpus/documents", "/v1/corpus/sources"
        named = shared.http.post(documents, files={"file": ("a.md", NOTE.encode())}, data={"name": "b.md"})
        assert error(named, 400) == "name is not supported"
        misspelled = shared.http.delete(sources, params={"source": "facts/wall.html", "erased": True})
        assert error(misspelled, 400) == "erased is not supported"
        assert error(shared.http.get(sources, params={"contain": "birds"}), 400) == "contain is not supported"

    def test_another_content_type(self, shared: Client) -> None:
        error(shared.http.post("/v1/corpus/documents", content=b"x", headers={"Content-Type": "text/plain"}), 415)

    def test_a_form_without_a_file(self, shared: Client) -> None:
        error(shared.http.post("/v1/corpus/documents", files={"other": ("a.md", b"x")}), 400)

    def test_an_unknown_source(self, shared: Client) -> None:
        error(shared.forget("facts/nothing.md"), 404)

    def test_an_unknown_job(self, shared: Client) -> None:
        error(shared.http.get("/v1/corpus/jobs/job-1"), 404)

    def test_pages_of_other_sites(self, shared: Client) -> None:
        for headers in (
            {"Origin": "http://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Origin": "null"},
            {"Origin": "http://["},
        ):
            sent = {"files": {"file": ("a.md", NOTE.encode())}, "headers": headers}
            error(shared.http.post("/v1/corpus/documents", **sent), 403)  # type: ignore[arg-type]

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "[", "127.0.0.1.evil.example"])
    def test_names_that_other_sites_let_lead_here(self, shared: Client, host: str) -> None:
        error(shared.http.get("/v1/corpus/sources", headers={"Host": host}), 403)

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"])
    def test_names_of_this_machine(self, shared: Client, host: str) -> None:
        assert shared.http.get("/v1/corpus/sources", headers={"Host": host}).status_code == 200

    def test_nothing_was_left(self, shared: Client, written_once: Place) -> None:  # noqa: F811
        assert shared.sources()["total"] == len(FACTS)
        assert shared.http.get("/v1/corpus/jobs").json()["data"] == []
        assert not [path for path in (written_once.folder / "uploads").rglob("*") if path.is_file()]


def test_a_document_from_its_upload_to_its_end(changing: Changing, nursery: Nursery) -> None:  # noqa: F811
    client, place = changing.writer, changing.place
    assert all("weathercock" not in one["text"] for one in client.found("the weathercock of Pellworm"))

    job = client.ended(client.upload("cock.md", NOTE.encode()))
    assert job["status"] == "done", job
    assert (job["result"]["source"], job["result"]["written"]) == ("uploads/cock.md", 1)
    assert client.found("the weathercock of Pellworm")[0]["source"] == "uploads/cock.md"  # by the next request
    (row,) = client.sources(contains="cock.md")["data"]
    assert row == {"object": "corpus.source", "id": "uploads/cock.md", "references": 1, "uploaded": True}

    # Another upload of the name replaces it, and one that cannot be read changes nothing.
    job = client.ended(client.text("cock.md", "The weathercock of Pellworm is made of tin."))
    assert (job["result"]["written"], job["result"]["forgotten"]) == (1, 1)
    assert [one["text"] for one in client.found("the weathercock of Pellworm", 1)] == [
        "The weathercock of Pellworm is made of tin."
    ]
    job = client.ended(client.upload("cock.md", b"The weathercock \0\1\2 binary"))
    assert (job["status"], job["error"]["type"]) == ("failed", "invalid_request_error")
    assert job["error"]["message"] == "cock.md is a binary file, not text"
    assert client.found("the weathercock of Pellworm", 1)[0]["text"].endswith("tin.")

    # `m3 sync` of the folder keeps it, while the server runs.
    assert nursery.m3(place, "sync", "uploads").code == 0
    assert client.sources(contains="cock.md")["total"] == 1

    job = client.ended(client.forget("uploads/cock.md", erase=True))
    assert (job["status"], job["result"]["forgotten"]) == ("done", 1)
    assert all("weathercock" not in one["text"] for one in client.found("the weathercock of Pellworm"))
    assert client.sources(contains="cock.md")["total"] == 0
    error(client.forget("uploads/cock.md"), 404)
    assert [path for path in place.folder.rglob("*") if path.is_file() and b"weathercock" in path.read_bytes()] == []

    job = client.ended(client.forget("../outside.md"))
    assert (job["status"], job["result"]["forgotten"]) == ("done", 1)
    assert (place.folder.parent / "outside.md").exists()  # it was not uploaded

    job = client.ended(client.http.post("/v1/corpus/verify"))
    assert job["result"]["clean"], job
    kinds = [one["kind"] for one in client.http.get("/v1/corpus/jobs").json()["data"]]
    assert kinds[:6] == ["verify", "forget", "forget", "add", "add", "add"]


def test_hostile_documents(changing: Changing) -> None:
    client, folder = changing.writer, changing.place.folder
    before = client.sources()["total"]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("word/document.xml", b" " * 1_000_000)
        packed.filelist[0].file_size = 1 << 29
    for name, content, reason in (
        ("bomb.docx", bomb.getvalue(), "larger than 256 MiB when it is unpacked"),
        ("no.pdf", b"%PDF-1.7 and no more", "no.pdf is damaged or no PDF file"),
        ("no.xlsx", b"PK\x03\x04 and no more", "no.xlsx is damaged or no"),
        ("blank.md", b" \n \n", "there is no text in blank.md"),
        ("lines.jsonl", b'{"text": 1}\n{', "lines.jsonl"),
    ):
        job = client.ended(client.upload(name, content))
        assert job["status"] == "failed", (name, job)
        message = job["error"]["message"]
        assert reason in message
        assert "\n" not in message
        assert str(folder) not in json.dumps(job)
    assert client.sources()["total"] == before
    office.word(folder / "made.docx", [("Seals", "Seals bask on the sandbank of Pellworm.")])
    job = client.ended(client.upload("made.docx", (folder / "made.docx").read_bytes()))
    assert job["status"] == "done", job["error"]
    assert not [path for path in (folder / "uploads/.waiting").rglob("*") if path.is_file()]


def test_keys(changing: Changing) -> None:
    with Client.of(changing.url) as nobody:
        for path in ("/v1/corpus/sources", "/v1/corpus/jobs", "/v1/corpus/references/0", "/v1/observe"):
            error(nobody.http.get(path), 401)
        error(nobody.text("a.md", NOTE), 401)
        assert nobody.http.get("/").status_code == 200
    with Client.of(changing.url, "reader-key") as reader:
        before = reader.sources()["total"]
        assert reader.found("herons")
        error(reader.text("a.md", NOTE), 403)
        error(reader.forget("facts/wall.html"), 403)
        error(reader.http.post("/v1/corpus/verify"), 403)
        assert reader.sources()["total"] == before


def test_a_key_for_some_sources_sees_no_others(changing: Changing) -> None:
    own = {"facts/ferry.md", "facts/wall.html"}
    ids = ids_of_all(changing.writer)
    with Client.of(changing.url, "narrow-key") as narrow:
        assert {one["id"] for one in narrow.sources()["data"]} == own
        assert narrow.sources()["total"] == 2
        for query in ("herons", "the owl Perpetua", "lamp of Uskerfold", "uploads facts"):
            assert {one["source"] for one in narrow.found(query, 100)} <= own
        asked = {"query": "herons", "sources": ["facts/birds.jsonl", "facts", "."]}
        assert {one["source"] for one in narrow.http.post("/v1/corpus/search", json=asked).json()["data"]} <= own
        asked = {"query": "herons", "where": {"source": ["facts/birds.jsonl", "facts/ferry.md"]}}
        found = narrow.http.post("/v1/corpus/search", json=asked).json()["data"]
        assert {one["source"] for one in found} == {"facts/ferry.md"}
        error(narrow.http.post("/v1/corpus/search", json={"query": "herons", "where": {"a": None}}), 400)
        read = [narrow.http.get(f"/v1/corpus/references/{id}") for id in ids]
        assert {one.json()["source"] for one in read if one.status_code == 200} == own
        assert {one.status_code for one in read} == {200, 404}
        for path in ("/v1/observe", "/v1/corpus/jobs", "/v1/corpus/jobs/job-1"):
            error(narrow.http.get(path), 403)
        error(narrow.forget("facts/ferry.md"), 403)
        error(narrow.text("a.md", NOTE), 403)


def ids_of_all(client: Client) -> list[int]:
    """The ids of all references."""
    return [one["id"] for one in client.found("all that there is", 100)]


def test_jobs_of_many_clients_are_made_in_order_and_reads_go_on(changing: Changing) -> None:
    client = changing.writer
    jobs = [client.text(f"note {number}", f"Note {number} is about buoy {number}.") for number in range(4)]
    reads = 0
    ended = threading.Event()

    def read() -> None:
        nonlocal reads
        with Client.of(changing.url, "reader-key") as other:
            while not ended.is_set():
                assert other.found("the northern wall")[0]["source"] == "facts/wall.html"
                reads += 1

    thread = threading.Thread(target=read)
    thread.start()
    results = [client.ended(job) for job in jobs]
    ended.set()
    thread.join()
    assert [job["status"] for job in results] == ["done"] * 4
    assert reads
    assert client.sources(contains="uploads/note")["total"] == 4


def test_a_job_waits_for_another_writer(changing: Changing) -> None:
    client = changing.writer
    with claimed(changing.place):
        response = client.text("patience.md", "Patience is a barge that waits for the tide.")
        client.waits_for_a_writer(response)
        assert client.found("the northern wall")[0]["source"] == "facts/wall.html"
    assert client.ended(response)["status"] == "done"


def test_a_process_that_dies_fails_its_job_alone(written: Place) -> None:  # noqa: F811
    before = changers()
    with serving(written.file) as url, Client.of(url) as client:
        with claimed(written):  # so that the job is still under way
            response = client.text("lost.md", NOTE)
            client.waits_for_a_writer(response)
            (child,) = changers() - before
            child.kill()
            job = client.ended(response)
            assert (job["status"], job["error"]["type"]) == ("failed", "server_error")
        assert client.sources()["total"] == len(FACTS)
        assert client.ended(client.text("kept.md", NOTE))["status"] == "done"
        assert client.ended(client.http.post("/v1/corpus/verify"))["result"]["clean"]
        with claimed(written):
            client.waits_for_a_writer(client.text("b.md", "A job that is dropped when the server is stopped."))
    assert written.m3("verify", "--json").json["clean"]


def test_a_document_stays_if_its_server_is_killed_while_it_is_added(written: Place) -> None:  # noqa: F811
    """The bank may have a part of it then, and `m3 sync` would forget that if the file were gone."""

    def progress(title: str, _done: int, _total: int) -> None:
        if title == "Writing memories":
            raise BrokenPipeError

    config = Config.load(written.file, environ={})
    change = Uploads(config).take("cock.md", NOTE.encode())
    with closing(Changes(config)) as changes, pytest.raises(BrokenPipeError):
        changes.make(change, progress)
    assert change.target.read_text() == NOTE
    assert written.m3("sync", "uploads").code == 0
    assert written.m3("inspect", "--json").json["memories"] == len(FACTS) + 2


def test_a_server_that_writes_by_itself_takes_no_documents(written: Place) -> None:  # noqa: F811
    with serving(written.file, read_only=False, recall__cold_start="true") as url, Client.of(url) as client:
        assert "recall.cold_start" in error(client.text("a.md", NOTE), 409)
        error(client.forget("facts/wall.html"), 409)
        assert client.found("the northern wall")[0]["source"] == "facts/wall.html"


@contextmanager
def claimed(place: Place) -> Iterator[None]:
    """Claim the bank as another process that writes does."""
    with FileLock(place.bank / "home/writer.lock"):
        yield
