"""``m3 bench arrivals``: every way to come gives the same tokens, and what is said of it adds up."""

import pytest

from m3runtime.lab.bench.arrivals import ALONE, ARRIVING, TOGETHER
from tests.end_to_end.commands import Place


def test_requests_get_their_tokens_however_they_come(written_once: Place) -> None:
    asked = ("--requests", "3", "--new-tokens", "10", "--rounds", "2", "--spread", "0.5", "--threads", "1")
    short = ("--set", "recall.chunk_tokens=4", "--set", "recall.lookahead_tokens=2")
    found = written_once.m3("bench", "arrivals", *asked, *short, "--json").json
    assert list(found["contenders"]) == [TOGETHER, ARRIVING, ALONE]
    assert found["same_tokens"]
    for one in found["contenders"].values():
        assert one["tokens_per_s"]["rounds"] == 2
        assert one["tokens_per_s"]["median"] > 0
        assert one["first_token_s"]["median"] > 0
    assert found["contenders"][TOGETHER]["kept"]["median"] == pytest.approx(1)
