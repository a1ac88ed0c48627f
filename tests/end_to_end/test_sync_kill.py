"""``m3 write`` is killed at any moment while files change; ``m3 sync --watch`` follows them and survives it."""

import json
import signal
import subprocess
from contextlib import closing
from random import Random

import pytest

from m3runtime.config.schema import Config
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.survey import Reading
from m3runtime.writing.following import follow
from m3runtime.writing.mirror import Mirror, MirrorReport
from tests.end_to_end.commands import M3, Place, environment
from tests.end_to_end.nursery import Nursery, errors

pytestmark = pytest.mark.long

NAMES = ("a.txt", "b.md", "c.txt", "deep/d.txt")
TEXTS = [f"The lamp of house {number} is kept dry on day {number * 37 % 101}." for number in range(90)]
WRITE = ("write", "docs", "--json")


def edit(place: Place, random: Random) -> None:
    """Write, remove or rename one of the files; many texts stand in several."""
    name, path = (one := random.choice(NAMES)), place.folder / "docs" / one
    if path.exists() and random.random() < 0.3:
        path.unlink()
    elif path.exists() and path.suffix == ".txt" and random.random() < 0.3:
        path.rename(place.folder / "docs" / random.choice(["e.txt", "f.txt"]))
    else:
        place.text(f"docs/{name}", "\n\n".join(random.sample(TEXTS, random.randrange(1, len(TEXTS)))))


def said(place: Place) -> dict[str, set[tuple[str, int, int]]]:
    """All places of each text, as the files say."""
    found: dict[str, set[tuple[str, int, int]]] = {}
    for path in sorted((place.folder / "docs").rglob("*.*")):
        for one in Splitter(len, max_tokens=60).split(path.read_text(), path.relative_to(place.folder).as_posix()):
            found.setdefault(one.text, set()).add((one.source, one.start, one.end))
    return found


def check(place: Place) -> None:
    """Fail unless the bank remembers exactly what the files say."""
    references = place.contents().references.values()
    held = {one.text: {(each.source, each.start, each.end) for each in one.places} for one in references}
    assert held == said(place)
    assert sum(len(one.places) for one in references) == sum(map(len, held.values()))
    assert place.m3("verify", "--json").json["clean"]
    for text in list(held)[:3]:
        assert place.m3("search", text, "-k", 1, "--json").json[0]["text"] == text


def kill_and_complete(nursery: Nursery, place: Place, rounds: int, seed: int) -> None:
    place.configure(codec={"kind": "raw"}, memory={"layers": [0], "reference_tokens": 40}, embedder={"dim": 64})
    place.text("docs/a.txt", "\n\n".join(TEXTS[:70]))
    place.text("docs/b.md", "\n\n".join(TEXTS[40:]))
    code, (_, end, _) = nursery.run(place, None, arguments=WRITE)
    assert code == 0, errors(place)
    check(place)
    random, killed = Random(seed), 0
    for _ in range(rounds):
        for _ in range(random.randrange(1, 4)):
            edit(place, random)
        code, _ = nursery.run(place, random.randrange(1, end), arguments=WRITE, delay=random.random() ** 3 * 0.1)
        assert code in (0, -signal.SIGKILL), errors(place)
        killed += code != 0
        if random.random() < 0.5:
            edit(place, random)
        if any((place.folder / "docs").rglob("*.*")):
            code, _ = nursery.run(place, arguments=WRITE)
            assert code == 0, errors(place)
            check(place)
    assert killed >= rounds // 3


def test_killed_while_it_brings_a_bank_in_step(nursery: Nursery, place: Place) -> None:
    kill_and_complete(nursery, place, rounds=6, seed=11)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_again_and_again(nursery: Nursery, place: Place) -> None:
    kill_and_complete(nursery, place, rounds=60, seed=12)


def test_folders_are_followed(place: Place) -> None:
    place.text("docs/a.txt", TEXTS[0])
    config = Config.load(place.file, environ={})
    with closing(Mirror(config, Reading())) as mirror, closing(follow(mirror, [place.folder / "docs"])) as reports:  # type: ignore[type-var]
        assert isinstance(next(reports), MirrorReport)
        check(place)
        place.text("docs/a.txt", TEXTS[1])
        place.text("docs/b.txt", TEXTS[2])
        while said(place).keys() - place.contents().texts.values():
            assert isinstance(next(reports), MirrorReport)
        check(place)
        place.text("docs/b.txt", b"\0")
        report = next(reports)
        assert isinstance(report, MirrorReport)
        assert list(report.survey.unread) == ["docs/b.txt"]
        assert TEXTS[2] in place.contents().texts.values()
        place.text("docs/b.txt", TEXTS[3])
        while not isinstance(next(reports), MirrorReport):
            pass
        check(place)


def test_only_folders_are_followed(place: Place) -> None:
    place.text("docs/a.txt", TEXTS[0])
    assert "only folders are followed" in place.m3("sync", "docs/a.txt", "--watch").complaint
    assert place.m3("sync", "docs/a.txt", "--json").json["written"] == 1


@pytest.mark.slow
def test_a_process_that_follows_is_killed_and_begins_anew(place: Place) -> None:
    place.text("docs/a.txt", "\n\n".join(TEXTS[:70]))
    for number in range(3):
        with subprocess.Popen(
            [M3, "sync", "docs", "--watch", "--json"],
            cwd=place.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            if number == 0:
                assert json.loads(process.stdout.readline())["written"] == 70
            place.text(f"docs/{number}.txt", f"The oar of house {number} is wet.")
            process.stdout.readline()
            place.text("docs/a.txt", "\n\n".join(TEXTS[number : 70 + number]))
            if number == 2:
                process.stdout.readline()
            process.kill()
    check(place)
