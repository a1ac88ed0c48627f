"""The laws of compaction: nothing of what was forgotten is left, and nothing else changes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3runtime.documents.reference import Place, Reference
from m3runtime.errors import TierReadOnlyError
from m3runtime.memory.block import Ids
from m3runtime.storage.home import Batch, Home
from m3runtime.testing.blocks import make_batch, make_embeddings, make_ids, make_reference, stored_bytes
from m3runtime.testing.home_cold import catalogue
from m3runtime.testing.home_contents import check_whole, contents, digest
from m3runtime.testing.home_durability import CHANGES
from m3runtime.testing.home_laws import HomeLaws
from m3runtime.testing.process import OtherProcess
from m3runtime.testing.threads import together
from m3runtime.testing.tier import check_read, read

LENGTHS = (5, 40, 300, 700, 1500, 2500)
"""Bytes of random content of texts: some lie among others in a page, some fill several."""


def make_secret(id: int) -> Reference:
    """A reference whose text and source are of no other, and of one of `LENGTHS`."""
    random = np.random.default_rng([id, 5])
    text = f"Secret {random.bytes(LENGTHS[id % len(LENGTHS)]).hex()}"
    return Reference(text, tokens=7, places=(Place(f"{random.bytes(9).hex()}.md", 0, len(text)),))


def make_secrets(ids: Iterable[int]) -> Batch:
    """All that `Home.commit` takes for these ids, with a reference of `make_secret` for each."""
    batch = make_batch(ids)
    return replace(batch, references=[make_secret(id) for id in batch.ids.tolist()])


def pieces(batch: Batch) -> list[bytes]:
    """Pieces of 8 to 12 bytes of all texts, names of sources, blocks and embeddings; each is found nowhere else."""
    found = list[bytes]()
    for block, reference, vector in zip(batch.blocks, batch.references, batch.embeddings, strict=True):
        for text in (reference.text.removeprefix("Secret "), reference.places[0].source.removesuffix(".md")):
            found += [text[at : at + 12].encode() for at in range(0, len(text) - 9, 16)]
        for binary in (stored_bytes(block)[48:], vector.astype("<f4").tobytes()):
            found += [binary[at : at + 8] for at in range(0, len(binary) - 7, 4)]
    return found


def left(folder: Path, wanted: Sequence[bytes]) -> set[bytes]:
    """The pieces that a file in a folder has."""
    contents = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    return {piece for piece in wanted if any(piece in content for content in contents)}


class ErasureLaws(HomeLaws):
    """`Home.compact` leaves no byte of what was forgotten, and changes nothing else."""

    def test_compacting_changes_nothing(self, home: Home) -> None:
        for change in CHANGES.values():
            change(home)
        before, next_id = contents(home), home.next_id()
        home.compact()
        assert contents(home) == before
        home.compact()
        assert contents(home) == before
        home.commit(make_batch([next_id, next_id + 1]))
        check_whole(home, make_ids(next_id, next_id + 1))
        after = contents(home)
        home.close()
        with self.open(self.place) as again:
            assert contents(again) == after

    def test_an_empty_home(self, home: Home) -> None:
        home.compact()
        assert home.next_id() == 0
        home.commit(make_batch([0]))
        check_whole(home, make_ids(0))

    def test_no_byte_of_what_was_forgotten_is_left(self, home: Home) -> None:
        if not self.of_files:
            pytest.skip("this home is not made of files")
        gone = make_ids(*range(1, 24, 2))
        home.commit(make_secrets(range(24)))
        catalogue(home, make_ids(40, 41))
        home.commit(make_secrets([50, 51]), replacing=gone[:4])
        home.discard(gone[4:])
        home.commit(make_secrets([60]))
        home.compact()
        assert not left(self.place, pieces(make_secrets(gone.tolist())))
        kept = make_ids(*range(0, 24, 2), 50, 51, 60)
        assert home.references(kept) == [make_secret(id) for id in kept.tolist()]
        assert check_read(home, kept).all()
        assert home.cold().tolist() == [40, 41]
        home.close()
        assert not left(self.place, pieces(make_secrets(gone.tolist())))

    def test_a_row_has_nothing_behind_its_block(self, home: Home) -> None:
        """Or a tier that keeps slots in files would keep what was in the buffer."""
        ids = make_ids(*range(12))
        home.commit(make_batch(range(12)))
        found, rows = read(home, ids)
        assert found.all()
        assert not any(row[len(stored_bytes(row)) :].any() for row in rows)

    def test_room_is_given_back(self, home: Home) -> None:
        ids = make_ids(*range(2000))
        home.commit(make_batch(range(2000)))
        home.discard(ids[:1900])
        before = home.stored_bytes()
        home.compact()
        assert home.stored_bytes() < before / 2
        check_whole(home, ids[1900:])

    def test_compacting_needs_a_home_that_may_be_written(self, home: Home) -> None:
        home.commit(make_batch([1]))
        home.close()
        with self.open(self.place, read_only=True) as again:
            with pytest.raises(TierReadOnlyError):
                again.compact()
            check_whole(again, make_ids(1))

    def test_threads_read_and_write_while_it_is_compacted(self, home: Home) -> None:
        home.commit(make_batch(range(8)))

        def work(number: int) -> None:
            for turn in range(6):
                if number == 0:
                    home.compact()
                elif number == 1:
                    home.commit(make_batch([100 + turn]))
                else:
                    check_all(home, make_ids(*range(8)))

        together(4, work)
        check_whole(home, make_ids(*range(8), *range(100, 106)))

    def test_a_reader_goes_on_after_compacting(self, home: Home) -> None:
        """It sees what is committed afterwards."""
        with OtherProcess(type(self)) as reader:
            home.commit(make_batch(range(6)))
            assert reader.ask("open", str(self.place), read_only=True) == {}
            for turn in range(1, 4):
                home.discard(make_ids(turn))
                home.compact()
                assert reader.ask("look") == {"contents": digest(home)}
                home.commit(make_batch([10 * turn]))
                assert reader.ask("look") == {"contents": digest(home)}


def check_all(home: Home, ids: Ids) -> None:
    """Assert that these ids can be read."""
    assert check_read(home, ids).all()
    assert home.references(ids) == [make_reference(id) for id in ids.tolist()]
    [(_, vectors)] = home.embeddings(ids)
    assert np.array_equal(vectors, make_embeddings(ids))
