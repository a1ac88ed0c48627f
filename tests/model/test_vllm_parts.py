"""What memories inside vLLM are made of, where no vLLM is needed. `tests/vllm` has the rest."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3model.loading import gguf
from m3model.loading.fingerprint import ModelIdentity
from m3model.vllm.recalls import Memories, Recalls
from m3model.vllm.settings import check, checkpoint_of, slots_of
from m3model.vllm.slots import Slots, Turn
from m3model.vllm.wish import Head, Wish
from m3model.vllm.words import Words
from m3runtime.bank.bias import BiasDirections, BiasFacts
from m3runtime.config.schema import Config
from m3runtime.config.where import as_mappings, conditions, in_sources
from m3runtime.errors import ConfigError, InputError
from m3runtime.retrieval.restriction import Restriction
from tests.model.banks import make_runtime
from tests.model.families import make_adapter, make_model

LAYERS, HEADS, DIM, SINK, WIDTH = 3, 4, 8, 2, 16
HEAD = Head((7, 8), 5, 9)


def turn(by: int) -> Turn:
    angles = by * 10_000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    return angles.cos(), angles.sin()


def rotated(vectors: torch.Tensor, by: int) -> torch.Tensor:
    cos, sin = turn(by)
    first, second = vectors.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def bias(memory_layers: tuple[int, ...] = (0, 2)) -> BiasDirections:
    torch.manual_seed(0)
    facts = BiasFacts("0" * 32, "tiny", memory_layers, (7, 8), "float32", SINK + WIDTH, 64, null_level=40.0)
    figures = [torch.ones(LAYERS, HEADS) for _ in range(4)]
    sink = [torch.randn(LAYERS, HEADS, SINK, DIM) for _ in range(2)]
    return BiasDirections(facts, torch.randn(LAYERS, HEADS, DIM), *figures, *sink)


def make_slots(count: int, by: int = 0, heads: slice = slice(None), **options: Any) -> Slots:
    given = {"temperature": 1.0, "log_weight": 0.0, "dtype": torch.float32, "device": torch.device("cpu"), **options}
    return Slots(bias(), count, turn(by), heads=heads, **given)


def part(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, HEADS, tokens, DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_memories_stand_behind_the_sink_and_what_is_left_is_empty() -> None:
    one, two = part(3, 1), part(2, 2)
    keys, values = make_slots(8).arrange([1, 2], [one, two], [0.0, 0.0])
    assert keys.shape == values.shape == (LAYERS, SINK + 8, HEADS, DIM)
    torch.testing.assert_close(keys[[0, 2], SINK : SINK + 3], one[0].transpose(1, 2))
    torch.testing.assert_close(values[[0, 2], SINK + 3 : SINK + 5], two[1].transpose(1, 2))
    torch.testing.assert_close(keys[:, :SINK], bias().sink_keys.transpose(1, 2))
    nothing = bias().null_keys[:, None]
    torch.testing.assert_close(keys[:, SINK + 5 :], nothing.expand(-1, 3, -1, -1))
    torch.testing.assert_close(keys[1, SINK:], nothing[1].expand(8, -1, -1))  # a layer that has no memories
    assert not values[:, SINK + 5 :].any()


def test_fewer_memories_than_before_leave_nothing_of_the_former_ones() -> None:
    slots = make_slots(8)
    slots.arrange([1, 2], [part(4, 1), part(4, 2)], [0.0, 0.0])
    keys, values = (one.clone() for one in slots.arrange([3], [part(1, 3)], [0.0]))
    fresh = make_slots(8).arrange([3], [part(1, 3)], [0.0])
    torch.testing.assert_close((keys, values), fresh)


@pytest.mark.parametrize("by", [5, -9])
def test_all_distances_stay(by: int) -> None:
    """Keys, biases and empty slots that are moved on meet a query that is moved on as the others meet the other."""
    query = torch.randn(DIM)
    here, there = (make_slots(6, of).arrange([1], [part(3, 1)], [-2.0])[0] for of in (0, by))
    torch.testing.assert_close(there @ rotated(query, by), here @ query, rtol=1e-4, atol=1e-3)


def test_a_weight_raises_every_logit_by_itself() -> None:
    direction = bias().directions[2]
    query = direction / direction.square().sum(-1, keepdim=True)  # [heads, dim], and meets its direction with one
    plain, weighted = (
        make_slots(4).arrange([1], [part(4, 1)], [weight])[0][2, SINK:].clone() for weight in (0.0, -3.0)
    )
    raised = ((weighted - plain) * query).sum(-1)
    torch.testing.assert_close(raised, torch.full_like(raised, -3.0))


def test_a_worker_has_its_own_heads_alone_and_temperature_sharpens_memories() -> None:
    whole = make_slots(6, temperature=0.5).arrange([1], [part(3, 1)], [-1.0])
    own = make_slots(6, heads=slice(1, 3), temperature=0.5).arrange([1], [part(3, 1)], [-1.0])
    for all_of_them, some in zip(whole, own, strict=True):
        torch.testing.assert_close(some, all_of_them[:, :, 1:3])
    torch.testing.assert_close(
        make_slots(6, temperature=0.5).arrange([1], [part(3, 1)], [0.0])[0][2, SINK : SINK + 3],
        2 * part(3, 1)[0][1].transpose(0, 1),
    )


def test_rotated_memories_are_kept_within_a_bound() -> None:
    size = 2 * 2 * HEADS * 3 * DIM * 4
    slots = make_slots(6, cache_bytes=2 * size)
    for id in (1, 2, 1, 3):
        slots.arrange([id], [part(3, id)], [0.0])
    assert [slots.has(id) for id in (1, 2, 3)] == [True, False, True]
    nothing = torch.empty(0)
    torch.testing.assert_close(
        slots.arrange([3], [(nothing, nothing)], [0.0]), make_slots(6).arrange([3], [part(3, 3)], [0.0])
    )


def test_a_kept_memory_stays_while_others_that_are_read_with_it_come() -> None:
    """A worker that found it in the cache has not read it from the bank."""
    nothing = torch.empty(0)
    for room in (0, 1, 2):
        slots = make_slots(9, cache_bytes=room * 2 * 2 * HEADS * 3 * DIM * 4)
        slots.arrange([1], [part(3, 1)], [0.0])
        first = (nothing, nothing) if slots.has(1) else part(3, 1)
        got = slots.arrange([2, 3, 1], [part(3, 2), part(3, 3), first], [0.0] * 3)
        torch.testing.assert_close(got, make_slots(9).arrange([2, 3, 1], [part(3, n) for n in (2, 3, 1)], [0.0] * 3))
        assert sum(slots.has(id) for id in (1, 2, 3)) == room


def test_the_bound_is_of_bytes_whatever_sizes_memories_have() -> None:
    size = 2 * 2 * HEADS * DIM * 4
    slots = make_slots(6, cache_bytes=6 * size)
    for id, tokens in ((1, 1), (2, 1), (3, 5)):
        slots.arrange([id], [part(tokens, id)], [0.0])
    assert [slots.has(id) for id in (1, 2, 3)] == [False, True, True]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"ids": [True]}, "ids"),
        ({"ids": [1.5]}, "ids"),
        ({"ids": [list(range(65))]}, "ids"),
        ({"ids": [[1], [2, 3]], "log_weights": [[0.0], [0.0]]}, "a number for each of the ids"),
        ({"log_weights": [0.0]}, "a number for each of the ids"),
        ({"ids": [1], "log_weights": [0.5]}, "between -80 and 0"),
        ({"ids": [1], "log_weights": [math.nan]}, "log_weights"),
        ({"memories": 0}, "memories"),
        ({"min_score": 2}, "min_score"),
        ({"source": "a"}, "source"),
        ([], "m3"),
        ("x", "m3"),
    ],
)
def test_wishes_that_say_nonsense_are_refused_by_name(said: Any, reason: str) -> None:
    with pytest.raises(InputError, match=r"kv_transfer_params\.m3") as refused:
        Wish.of({"m3": said})
    assert reason in str(refused.value)


def test_wishes() -> None:
    assert Wish.of({}) is None
    assert Wish.of({"m3": None}) == Wish()
    named = Wish.of({"m3": {"ids": [1, 2], "log_weights": [0.0, -1.5]}})
    assert named is not None
    assert (named.ids, named.log_weights, named.shares) == (((1, 2),), ((0.0, -1.5),), True)
    assert not Wish(ids=((1,), (2,))).shares
    assert not Wish().shares
    assert [Wish(refresh=each).every for each in (True, False, 3)] == [1, 0, 3]
    assert Wish(off=True).every == 0
    limits = Wish(sources=("docs",), memories=2, min_score=0.5).restriction
    assert limits == Restriction(2, 0.5, in_sources(["docs"]))


def test_a_wish_has_all_conditions_of_a_restriction() -> None:
    """What a key allows and what its request asks for may be on the same field."""
    years = conditions({"year": {"at_least": 2020, "at_most": 2024}, "team": {"prefix": "l"}, "lang": ["en", "de"]})
    where = in_sources(["docs/", "a.md"]) | in_sources(["docs/b.md"]) | conditions({"year": {"at_least": 2022}}) | years
    found = Wish.of(json.loads(json.dumps({"m3": {"where": as_mappings(where)}})))
    assert found is not None
    assert found.restriction.where == where
    assert as_mappings(frozenset()) == []
    assert Wish(where=({"lang": "en"},)).restriction.where == conditions({"lang": "en"})


def test_a_head_is_known_from_what_only_resembles_it() -> None:
    assert HEAD.ids == [7, 8, 9, 9, 9, 9, 9]
    assert HEAD.begins([*HEAD.ids, 3])
    for prompt in ([], [3], HEAD.ids, [*HEAD.ids, 9, 3], [*HEAD.ids[:-1], 3, 4], [8, *HEAD.ids[1:], 3]):
        assert not HEAD.begins(prompt)
    assert HEAD.resembles([7, 8, 9, 9, 9, 9, 3])
    assert not HEAD.resembles([7, 8, 9, 3])
    assert not HEAD.resembles([7, 8])


@given(st.lists(st.integers(0, 20), max_size=30))
def test_the_last_words_are_a_stretch_of_the_tokens(tokens: list[int]) -> None:
    last = list(Words(str, frozenset({0, 1})).last(tokens))
    assert last == tokens or (len(last) >= 4 and not {0, 1} & set(last))
    assert any(tokens[at : at + len(last)] == last for at in range(len(tokens) + 1))


def test_the_last_words_of_a_chat_are_the_users() -> None:
    words = Words(str, frozenset({0}))
    assert words.last([0, 5, 5, 5, 5, 0, 11, 12, 13, 14, 15, 0, 2, 0, 3, 3]) == [11, 12, 13, 14, 15]


def test_sink_and_slots_fill_whole_blocks() -> None:
    config = Config.model_validate({"bank": "b", "model": {"path": "m"}, "embedder": {"path": "e"}})
    for block in (16, 32, 128):
        slots = slots_of(config, bias(), block)
        assert (SINK + slots) % block == 0
        assert 5 * WIDTH <= slots < 5 * WIDTH + block
    sparse = config.model_copy(update={"memory": config.memory.model_copy(update={"tokens_per_head": 4})})
    assert slots_of(sparse, bias(), 16) == 32 - SINK


def test_heads_with_budgets_of_their_own_are_refused() -> None:
    memory = {"tokens_per_head": [[4, 3, 3, 3], [3, 3, 3, 3]]}
    config = Config.model_validate({"bank": "b", "model": {"path": "m"}, "embedder": {"path": "e"}, "memory": memory})
    shape: Any = None  # nothing is asked of it
    with pytest.raises(ConfigError, match=r"memory.tokens_per_head must be all or one number for vLLM"):
        check(config, bias(), shape)


def test_a_converted_file_is_served_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "lamp.gguf"
    config = Config.model_validate({"bank": tmp_path, "model": {"path": str(file)}, "embedder": {"path": "none"}})
    with pytest.raises(ConfigError, match=r"no such file: .*lamp\.gguf"):
        checkpoint_of(config)
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"lamp\.gguf is not converted yet; `m3 init` and `m3 write` do it"):
        checkpoint_of(config)
    gguf.folder_of(file).mkdir(parents=True)
    assert checkpoint_of(config) == str(gguf.folder_of(file))
    other = config.model.model_copy(update={"path": "of/the-hub"})
    assert checkpoint_of(config.model_copy(update={"model": other})) == "of/the-hub"


def test_a_checkpoint_is_known_by_its_files(tmp_path: Path) -> None:
    model = copy.deepcopy(make_model("llama"))
    model.save_pretrained(tmp_path)
    expected, found = ModelIdentity.of(model), ModelIdentity.of_checkpoint(tmp_path, model.config.get_text_config())
    assert found.weights == expected.weights
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    other = ModelIdentity.of_checkpoint(tmp_path, model.config.get_text_config())
    assert other.weights != expected.weights
    assert other.differences(expected.fingerprint, expected.settings) is None
    assert found.differences(expected.fingerprint, expected.settings) == []
    assert replace(found, weights="0" * 32) != found


class Device(Recalls):
    """Notes whether anybody heard of memories before they had arrived on the device."""

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime, torch.float32)
        self.heard: list[bool] = []
        self.asks: list[Memories] = []

    def _arrive(self) -> None:
        self.heard += [one.done() for one in self.asks]


def test_nobody_hears_of_memories_before_they_are_on_the_device(tmp_path: Path) -> None:
    with make_runtime(make_adapter(), tmp_path / "bank", ["the harbour lamp", "a bell and a heron"]) as runtime:
        recalls = Device(runtime)
        stream = runtime.stream(torch.float32)
        recalls.asks.append(recalls.ask(stream, "the harbour lamp", wait=True))
        recalls.send()
        assert recalls.asks[0].result(60).ids
        recalls.close()
        stream.close()
    assert recalls.heard == [False]
