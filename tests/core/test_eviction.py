import pytest

from m3runtime.errors import ConfigError
from m3runtime.eviction import EvictionPolicy, LruPolicy, make_policy
from m3runtime.testing.eviction import EvictionContract, anything


class TestLruPolicy(EvictionContract):
    def make(self, slots: int) -> EvictionPolicy:
        return make_policy("lru", slots)


def test_lru_gives_up_what_was_used_longest_ago() -> None:
    policy = LruPolicy(3)
    for id in (1, 2, 3):
        policy.admitted(id)
    policy.touched(1)
    policy.touched(3)
    policy.touched(1)
    order = []
    while (victim := policy.victim(anything)) is not None:
        order.append(victim)
        policy.removed(victim)
    assert order == [2, 3, 1]


def test_an_unknown_policy_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="one of lru, not 'fifo'"):
        make_policy("fifo", 3)
