"""`EvictionContract`: the laws of an eviction policy."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from m3runtime.storage.eviction import EvictionPolicy
from m3runtime.testing.blocks import LAST_ID


class EvictionContract(ABC):
    """Subclass it as ``TestMyPolicy`` and say how to make the policy."""

    @abstractmethod
    def make(self, slots: int) -> EvictionPolicy:
        """A new policy for a tier of ``slots`` blocks."""

    @pytest.mark.parametrize("slots", [0, 1, 4])
    def test_a_new_policy_has_no_victim(self, slots: int) -> None:
        policy = self.make(slots)
        assert policy.slots == slots
        assert len(policy) == 0
        assert policy.victim() is None

    def test_the_victim_is_held_and_is_not_gone_before_removed(self) -> None:
        policy = self.make(2)
        policy.admitted(0)
        policy.admitted(LAST_ID)
        assert policy.victim() in (0, LAST_ID)
        assert policy.victim() in (0, LAST_ID)
        assert len(policy) == 2

    def test_what_was_removed_is_no_victim(self) -> None:
        policy = self.make(2)
        policy.admitted(1)
        policy.admitted(2)
        policy.removed(1)
        assert policy.victim() == 2
        policy.removed(2)
        assert policy.victim() is None

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
            assert policy.victim() == 5
            policy.removed(5)

    def test_thousands_are_given_up_once_each(self) -> None:
        policy, random = self.make(3000), Random(0)
        for id in range(3000):
            policy.admitted(id)
        for _ in range(3000):
            policy.touched(random.randrange(3000))
        given_up = []
        while (victim := policy.victim()) is not None:
            given_up.append(victim)
            policy.removed(victim)
        assert sorted(given_up) == list(range(3000))
        assert len(policy) == 0

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
                leased = set(random.sample(sorted(held), 5))
                victim = policy.victim(lambda id, leased=leased: id not in leased)  # type: ignore[misc]
                assert victim in held - leased
                policy.removed(victim)
                held.remove(victim)
            policy.admitted(id)
            held.add(id)
            assert len(policy) == len(held)

    def test_agrees_with_a_set_in_any_order_of_calls(self) -> None:
        make = self.make

        class Machine(EvictionMachine):
            def make_policy(self, slots: int) -> EvictionPolicy:
                return make(slots)

        run_state_machine_as_test(Machine)


class EvictionMachine(RuleBasedStateMachine):
    """A policy against the set of what its tier holds, in every order of calls that hypothesis thinks of."""

    make_policy: Callable[[int], EvictionPolicy]

    @initialize(slots=st.integers(1, 12))
    def start(self, slots: int) -> None:
        self.policy = self.make_policy(slots)
        self.held: set[int] = set()
        self.leased: set[int] = set()

    @rule(id=st.integers(0, 15) | st.just(LAST_ID))
    def ask_for(self, id: int) -> None:
        """As a tier does: touch what is held, make room for what is not."""
        if id in self.held:
            self.policy.touched(id)
            return
        if len(self.held) == self.policy.slots:
            victim = self.policy.victim(lambda other: other not in self.leased)
            if self.held <= self.leased:
                assert victim is None
                return
            assert victim in self.held - self.leased
            self.policy.removed(victim)
            self.held.remove(victim)
        self.policy.admitted(id)
        self.held.add(id)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), score=st.floats(-1, 1, width=32))
    def score(self, data: st.DataObject, score: float) -> None:
        self.policy.scored(data.draw(st.sampled_from(sorted(self.held))), score)

    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        """Any number of those held, all of them included."""
        self.leased = {id for id in sorted(self.held) if data.draw(st.booleans())}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.held)))
        self.policy.removed(id)
        self.held.remove(id)
        self.leased.discard(id)

    @rule()
    def name_a_victim_and_keep_it(self) -> None:
        victim = self.policy.victim()
        assert victim in self.held or (victim is None and not self.held)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def the_only_one_is_found(self, data: st.DataObject) -> None:
        only = data.draw(st.sampled_from(sorted(self.held)))
        assert self.policy.victim(lambda id: id == only) == only

    @invariant()
    def counts_what_is_held(self) -> None:
        assert len(self.policy) == len(self.held)
