import random
from collections.abc import Iterable, Sequence

import pytest

from m3runtime.errors import ConfigError
from m3runtime.storage.eviction import (
    POLICIES,
    EvictionPolicy,
    LruPolicy,
    S3FifoPolicy,
    ScoredPolicy,
    make_policy,
)
from m3runtime.testing.eviction import EvictionContract


class TestLruPolicy(EvictionContract):
    def make(self, slots: int) -> EvictionPolicy:
        return make_policy("lru", slots)


class TestS3FifoPolicy(EvictionContract):
    def make(self, slots: int) -> EvictionPolicy:
        return make_policy("s3-fifo", slots)


class TestScoredPolicy(EvictionContract):
    def make(self, slots: int) -> EvictionPolicy:
        return make_policy("score", slots)


def use(policy: EvictionPolicy, held: set[int], ids: Iterable[int]) -> int:
    """Read through a cache. Returns how many were held."""
    hits = 0
    for id in ids:
        if id in held:
            hits += 1
            policy.touched(id)
            continue
        if len(held) == policy.slots:
            victim = policy.victim()
            assert victim is not None
            held.remove(victim)
            policy.removed(victim)
        policy.admitted(id)
        held.add(id)
    return hits


def drain(policy: EvictionPolicy) -> Sequence[int]:
    """What is held, in the order in which it would be given up."""
    order = []
    while (victim := policy.victim()) is not None:
        order.append(victim)
        policy.removed(victim)
    return order


def test_lru_gives_up_what_was_used_longest_ago() -> None:
    policy = LruPolicy(3)
    use(policy, set(), [1, 2, 3, 1, 3, 1])
    assert drain(policy) == [2, 3, 1]


def test_lru_passes_over_what_is_in_use_once_in_a_round() -> None:
    """Otherwise each id that an owner full of leases admits costs a walk over all of them."""
    policy, asked = LruPolicy(150), list[int]()
    for id in range(150):
        policy.admitted(id)
    for id in range(150, 250):
        victim = policy.victim(lambda other: asked.append(other) or other >= 100)  # type: ignore[func-returns-value]
        assert victim == id - 50
        policy.removed(victim)
        policy.admitted(id)
    assert len(asked) <= 3 * 100 + 100


def test_a_scan_flushes_the_hot_set_out_of_lru_and_not_out_of_s3_fifo() -> None:
    kept = {}
    for name in ("lru", "s3-fifo"):
        policy, held = make_policy(name, 20), set[int]()
        use(policy, held, [*range(10)] * 5)
        use(policy, held, range(1000, 1060))
        kept[name] = len(held.intersection(range(10)))
    assert kept == {"lru": 0, "s3-fifo": 10}


def test_no_scan_is_long_enough_for_s3_fifo() -> None:
    policy, held = S3FifoPolicy(20), set[int]()
    use(policy, held, [*range(10)] * 5)
    use(policy, held, range(1000, 20_000))
    assert held.issuperset(range(10))


def test_s3_fifo_gives_up_what_was_used_once_before_what_was_used_again() -> None:
    policy = S3FifoPolicy(10)
    use(policy, set(), [*range(10), 0, 0, 1, 2, 2])
    # 1 was used once after it came, which is not more than once. 0 and 2 went on to main.
    assert drain(policy) == [1, 3, 4, 5, 6, 7, 8, 9, 0, 2]


def test_s3_fifo_takes_what_comes_back_soon_into_main() -> None:
    policy, held = S3FifoPolicy(10), set[int]()
    use(policy, held, range(10))
    use(policy, held, [10, 11])
    assert 0 not in held
    use(policy, held, [0])  # from the ghost queue; 2 made room
    use(policy, held, range(20, 60))
    assert 0 in held
    assert len(held) == 10


@pytest.mark.parametrize(
    ("uses", "order"), [([0, 0, 1, 2, 2, 2], [3, 1, 0, 2]), ([0] * 100 + [1, 2, 3] * 3, [0, 1, 2, 3])]
)
def test_s3_fifo_gives_main_a_round_for_each_use_up_to_three(uses: list[int], order: list[int]) -> None:
    policy, held = S3FifoPolicy(4), set[int]()
    use(policy, held, [0, 1, 2, 3] * 3)
    policy.victim()  # all go on to main
    use(policy, held, uses)
    assert drain(policy) == order


def test_s3_fifo_finds_the_only_one_on_its_way_to_main() -> None:
    policy, held = S3FifoPolicy(20), set[int]()  # two slots of small
    use(policy, held, [*range(20)] * 3)
    use(policy, held, [100] * 3)  # alone in small, and used enough to leave it
    assert policy.victim(lambda id: id == 100) == 100


def test_score_keeps_what_scored_high_among_equally_recent() -> None:
    policy = ScoredPolicy(4)
    for id in (1, 2, 3, 4):
        policy.admitted(id)
    for id, score in ((1, 0.3), (2, 0.9), (3, -0.2), (4, 0.6)):
        policy.scored(id, score)
    assert drain(policy) == [3, 1, 4, 2]


def test_score_outweighs_recency_for_a_while() -> None:
    policy, held = ScoredPolicy(20), set[int]()
    use(policy, held, [1, 2])
    policy.scored(1, 0.9)
    use(policy, held, range(100, 120))
    assert held.intersection((1, 2)) == {1}
    use(policy, held, range(200, 260))
    assert 1 not in held


def test_score_counts_a_use_without_one() -> None:
    policy = ScoredPolicy(3)
    use(policy, set(), [1, 2, 3, 1])
    assert drain(policy) == [2, 3, 1]


def test_score_is_right_after_very_many_uses() -> None:
    """As a policy that began anew: only differences of time matter."""
    for slots in (1, 50, 10**7):
        old, new = ScoredPolicy(slots), ScoredPolicy(slots)
        old._time = 10**12
        drawing = random.Random(slots)
        for policy in (old, new):
            for id in range(40):
                policy.admitted(id)
        uses = [(drawing.randrange(40), drawing.uniform(-1, 1)) for _ in range(400)]
        for policy in (old, new):
            for id, score in uses:
                policy.touched(id)
                policy.scored(id, score)
        assert drain(old) == drain(new)


def test_score_that_is_no_number_does_no_harm() -> None:
    policy = ScoredPolicy(3)
    use(policy, set(), [1, 2, 3])
    policy.scored(2, float("nan"))
    policy.scored(3, float("inf"))
    assert drain(policy) == [1, 2, 3]


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_policy_keeps_is_bounded(name: str) -> None:
    """Blocks that come and are discarded, and ever new ones, leave nothing behind."""
    policy = make_policy(name, 10)
    for id in range(3000):
        policy.admitted(id)
        policy.touched(id)
        if id % 3:
            policy.removed(id)
        elif len(policy) == 10:
            victim = policy.victim()
            assert victim is not None
            policy.removed(victim)
    sizes = [len(part) for part in vars(policy).values() if hasattr(part, "__len__")]
    assert sizes
    assert max(sizes) <= 40


def test_an_unknown_policy_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="one of lru, s3-fifo, score, not 'fifo'"):
        make_policy("fifo", 3)
