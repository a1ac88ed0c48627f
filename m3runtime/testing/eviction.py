"""`EvictionContract`: the laws of an eviction policy."""

from abc import ABC, abstractmethod
from random import Random

from m3runtime.eviction import EvictionPolicy
from m3runtime.testing.blocks import LAST_ID


def anything(_: int) -> bool:
    """Every id may go."""
    return True


class EvictionContract(ABC):
    """Subclass it as ``TestMyPolicy`` and say how to make the policy."""

    @abstractmethod
    def make(self, slots: int) -> EvictionPolicy:
        """A new policy for a tier of ``slots`` blocks."""

    def test_a_new_policy_has_no_victim(self) -> None:
        policy = self.make(4)
        assert len(policy) == 0
        assert policy.victim(anything) is None

    def test_the_victim_is_held_and_is_not_gone_before_removed(self) -> None:
        policy = self.make(2)
        policy.admitted(0)
        policy.admitted(LAST_ID)
        assert policy.victim(anything) in (0, LAST_ID)
        assert policy.victim(anything) in (0, LAST_ID)
        assert len(policy) == 2

    def test_what_was_removed_is_no_victim(self) -> None:
        policy = self.make(2)
        policy.admitted(1)
        policy.admitted(2)
        policy.removed(1)
        assert policy.victim(anything) == 2
        policy.removed(2)
        assert policy.victim(anything) is None

    def test_passes_over_what_is_not_evictable(self) -> None:
        policy = self.make(8)
        for id in range(8):
            policy.admitted(id)
        for only in range(8):
            assert policy.victim(lambda id, only=only: id == only) == only  # type: ignore[misc]
        assert policy.victim(lambda _: False) is None

    def test_an_id_may_come_back(self) -> None:
        policy = self.make(1)
        for _ in range(3):
            policy.admitted(5)
            policy.touched(5)
            assert policy.victim(anything) == 5
            policy.removed(5)

    def test_agrees_with_a_set_over_a_long_random_life(self) -> None:
        random, policy, held = Random(0), self.make(16), set[int]()
        for _ in range(5000):
            id = random.randrange(64)
            if id in held:
                if random.random() < 0.8:
                    policy.touched(id)
                else:
                    policy.removed(id)
                    held.remove(id)
                continue
            if len(held) == 16:
                pinned = set(random.sample(sorted(held), 5))
                victim = policy.victim(lambda id, pinned=pinned: id not in pinned)  # type: ignore[misc]
                assert victim in held - pinned
                policy.removed(victim)
                held.remove(victim)
            policy.admitted(id)
            held.add(id)
            assert len(policy) == len(held)
