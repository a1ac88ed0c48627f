"""Bias directions: a key raised along one has its logit raised for every query, and null slots are seen by none."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from m3model.attention.implementation import attend
from m3model.attention.layout import Pair
from m3model.bias.calibration import Calibration, Measured
from m3model.bias.fitting import SIZES, Logits, Moments, Spread
from m3model.bias.queries import Asked, capped, watched
from m3model.bias.texts import served_ids
from m3model.bias.verdict import judged
from m3model.transformers import TransformersAdapter
from m3runtime.bank.bias import BiasDirections, BiasFacts
from m3runtime.errors import ConfigError, InputError
from tests.model.families import make_adapter, make_model, make_tokenizer, random_text

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral-sliding", "phi3", "phi-partial"]
"""Grouped heads and one KV head, biases and norms of queries, capped logits, sliding windows, partial rotation."""
LENGTH = 96
CAP = 50.0
"""Of logits, as Gemma 2 has it; the tiny one has 5."""


@cache
def common(family: str) -> Any:
    """A tiny model whose hidden states, and so its queries, have much in common, as those of trained models do."""
    model = copy.deepcopy(make_model(family))
    torch.manual_seed(1)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table += 5.0 * table.std() * torch.randn(table.shape[1])
    for layer in model.model.layers:
        if getattr(layer.self_attn, "attn_logit_softcapping", None):
            layer.self_attn.attn_logit_softcapping = CAP
    return model


def references(count: int = 24) -> list[str]:
    return [random_text(make_tokenizer(eos=False), 20, seed=seed) for seed in range(count)]


def calibration(adapter: TransformersAdapter) -> Calibration:
    return Calibration(adapter.layout.layers, adapter.session, adapter.encode, partial(served_ids, adapter.tokens))


@cache
def calibrated(family: str) -> tuple[TransformersAdapter, Measured]:
    adapter = make_adapter(family, model=common(family))
    return adapter, calibration(adapter).run(references(), LENGTH, lambda *_: None)


def logits(adapter: TransformersAdapter, memories: Sequence[Pair], weights: Sequence[float] | None = None) -> Tensor:
    session = adapter.session(1, context=LENGTH)
    session.read([list(memories)], None if weights is None else [list(weights)])
    return session.all_logits(torch.tensor([served_ids(adapter.tokens, references()[5:9], 60)]))[0]


def memories_of(adapter: TransformersAdapter, count: int) -> list[Pair]:
    found = adapter.encode(references()[:count])
    rows = zip(found.keys, found.values, found.tokens.tolist(), strict=True)
    return [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values, tokens in rows]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss-sliding"])
def test_raised_keys_are_read_as_weighted_ones(family: str) -> None:
    adapter, measured = calibrated(family)
    memories, weights = memories_of(adapter, 3), [0.0, -2.0, -6.0]
    raised = [
        (keys + weight * measured.directions[:, :, None], values)
        for (keys, values), weight in zip(memories, weights, strict=True)
    ]
    exact = logits(adapter, memories, weights)
    missed, without = ((one - exact).square().mean() for one in (logits(adapter, raised), logits(adapter, memories)))
    # An unweighted memory has all of its attention too much, and a raised one a share of it: see the verdict.
    share = float(measured.error.square().mean().sqrt()) / math.e
    assert missed < (4 * share) ** 2 * without, (missed, without, share)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_null_slots_are_invisible(family: str, stored: torch.dtype) -> None:
    """A cache in a narrow dtype keeps null keys as well: only their direction and size matter, about."""
    adapter, measured = calibrated(family)
    memories = memories_of(adapter, 1)
    level = next(one for one in (40.0, 80.0, 160.0) if measured.null_weight(one).max() < 1e-6)
    keys = (-level * measured.directions)[:, :, None].to(stored).float().expand(-1, -1, 50, -1)
    assert keys.isfinite().all()
    wanted = logits(adapter, memories)
    assert float((logits(adapter, [*memories, (keys, torch.zeros_like(keys))]) - wanted).abs().max()) < 1e-4
    zeros = torch.zeros_like(keys)
    assert float((logits(adapter, [*memories, (zeros, zeros)]) - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_seen_of_queries_is_what_attention_computes_with(family: str) -> None:
    """A key of known logit takes the share of attention that the total of the others says."""
    adapter, measured = calibrated(family)
    seen: list[tuple[Asked, Tensor]] = []
    session = adapter.session(1, context=LENGTH)
    session.read([memories_of(adapter, 2)])

    def look(asked: Asked) -> None:
        null = -2.0 * measured.directions[asked.layer]  # [kv_heads, head_dim]
        expected = capped((asked.grouped() @ null[:, :, None])[..., 0], asked.scaling.softcap)
        total, _ = asked.weighing(1)
        keys = torch.cat([null[None, :, None], asked.keys], 2)
        values = torch.zeros_like(keys)
        values[:, :, 0] = 1
        mask = asked.cache.mask(asked.keys.shape[2], asked.window)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (1, 0))
        share = attend(asked.query, keys, values, mask, asked.scaling)[..., 0]
        wanted = (expected - torch.logaddexp(total, expected)).exp()
        torch.testing.assert_close(share.reshape_as(wanted), wanted, rtol=1e-4, atol=1e-5)
        seen.append((asked, total))

    with watched(adapter.model, look):
        session.feed(torch.tensor([served_ids(adapter.tokens, references(), 30)]))
    assert [asked.layer for asked, _ in seen] == list(range(adapter.layout.layers))
    session.feed(torch.tensor([[5]]))
    assert len(seen) == adapter.layout.layers  # nobody looks any more


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_model_whose_queries_have_nothing_in_common_is_refused(family: str) -> None:
    adapter = make_adapter(family)
    with pytest.raises(
        ConfigError, match=rf"^model.path: {family} has no bias.*layer \d, KV head \d: -.* try a smaller"
    ):
        adapter.calibrate_bias(references(), LENGTH, lambda *_: None)


def test_a_model_whose_heads_are_not_alike_is_refused() -> None:
    with pytest.raises(ConfigError, match="alike in all layers"):
        make_adapter("gemma4_text").calibrate_bias(references(), LENGTH, lambda *_: None)


def test_a_model_whose_cap_is_too_near_for_null_slots_is_refused() -> None:
    model = copy.deepcopy(common("gemma2"))
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 5.0
    with pytest.raises(ConfigError, match="gemma2 has no bias directions"):
        make_adapter("gemma2", model=model).calibrate_bias(references(), LENGTH, lambda *_: None)


def test_the_result_is_the_adapters() -> None:
    adapter, measured = calibrated("qwen3")
    steps: list[tuple[int, int]] = []
    found = adapter.calibrate_bias(references(), LENGTH, lambda done, total: steps.append((done, total)))
    torch.testing.assert_close(found.directions, measured.directions)
    assert found.facts.model == adapter.model_fingerprint
    assert found.facts.layers == adapter.spec.layers
    assert (found.facts.offset, found.facts.length) == (adapter.offset, LENGTH)
    assert found.facts.sink_ids == tuple(adapter.sink_ids)
    assert found.sink_keys.shape[2] == len(adapter.sink_ids)
    assert [one.end - adapter.offset for one in found.facts.stretches] == [12 * n for n in range(1, 9)]
    assert steps[-1] == (2 * LENGTH, 2 * LENGTH)
    assert steps == sorted(steps)


def test_directions_are_of_all_layers_and_weights_of_the_memory_layers() -> None:
    adapter = make_adapter("qwen3", model=common("qwen3"), layers=[1, 2], tokens_per_head=8)
    found = adapter.calibrate_bias(references(), LENGTH, lambda *_: None)
    assert found.directions.shape[0] == adapter.layout.layers
    keys = adapter.encode(references()[:1]).keys[0]
    moved = found.raised(keys, 1.5) - keys
    torch.testing.assert_close(moved[:, :, 0], 1.5 * found.directions[1:3])


def test_directions_that_are_fitted_to_near_positions_fail_far_from_them() -> None:
    adapter = make_adapter("qwen3", model=common("qwen3"))
    near = calibration(adapter).run(references(), 32, lambda *_: None).directions
    far = calibration(adapter).run(references(), 448, lambda *_: None)
    at_end = [Logits(one, 1) for one in near]
    session = adapter.session(1, context=448)
    ids = served_ids(adapter.tokens, references(), 448)
    session.feed(torch.tensor([ids[:400]]))
    with watched(adapter.model, lambda asked: at_end[asked.layer].add(asked.grouped(), 0)):
        session.feed(torch.tensor([ids[400:]]))
    errors = Spread.stacked([one.spread() for one in at_end]).error
    assert errors.median() > 2 * far.by_position.error[..., -1].median()


@pytest.mark.parametrize(
    ("length", "texts", "said"),
    [(10_000, 24, "--length 10000: after the memories this model has 4"), (LENGTH, 1, "two references at least")],
)
def test_what_cannot_be_calibrated(length: int, texts: int, said: str) -> None:
    adapter, _ = calibrated("llama")
    with pytest.raises(InputError, match=said):
        adapter.calibrate_bias(references(texts), length, lambda *_: None)


class TestFitting:
    def queries(self, n: int = 400) -> Tensor:
        torch.manual_seed(3)
        return torch.randn(2, n, 8) * torch.linspace(0.1, 2, 8) + torch.tensor([1.0, -2.0])[:, None, None]

    def test_no_other_direction_is_more_constant(self) -> None:
        queries, moments = self.queries(), Moments()
        moments.add(queries)
        found = moments.direction()

        def error(direction: Tensor) -> Tensor:
            logits = (queries @ direction[:, :, None])[..., 0]
            return (logits / logits.mean(1, keepdim=True) - 1).square().mean(1)

        torch.testing.assert_close((queries @ found[:, :, None])[..., 0].mean(1), torch.ones(2))
        for seed in range(20):
            torch.manual_seed(seed)
            other = found + 0.05 * found.norm() * torch.randn_like(found)
            assert (error(other) > error(found)).all()

    def test_pieces_are_as_good_as_the_whole(self) -> None:
        whole, parts = Moments(), Moments()
        whole.add(self.queries())
        for part in self.queries().split(37, dim=1):
            parts.add(part)
        torch.testing.assert_close(parts.direction(), whole.direction(), rtol=1e-3, atol=1e-4)

    def test_queries_without_a_common_part_have_no_direction(self) -> None:
        both, moments = self.queries(), Moments()
        moments.add(torch.cat([both, -both], 1))
        with pytest.raises(InputError, match="nothing in common"):
            moments.direction()
        with pytest.raises(InputError, match="no queries"):
            Moments().direction()

    def test_the_spread_is_that_of_all_logits(self) -> None:
        queries = self.queries()
        direction = torch.randn(2, 8)
        logits = (queries @ direction[:, :, None])[..., 0]
        summed = Logits(direction, 3)
        for bucket, part in enumerate(queries.split([100, 250, 50], dim=1)):
            for piece in part.split(30, dim=1):
                summed.add(piece, bucket)
        found = summed.spread()
        torch.testing.assert_close(found.mean, logits.mean(1))
        torch.testing.assert_close(found.std, logits.std(1, correction=0))
        torch.testing.assert_close(found.error, (logits - 1).square().mean(1).sqrt())
        torch.testing.assert_close(found.least, logits.amin(1))
        torch.testing.assert_close(found.greatest, logits.amax(1))
        torch.testing.assert_close(summed.spread(by_bucket=True).least[:, 1], logits[:, 100:350].amin(1))
        shares = summed.shares
        torch.testing.assert_close(shares.sum(1), torch.ones(2, dtype=torch.float64))
        below = (logits < SIZES[150]).double().mean(1)
        torch.testing.assert_close(shares[:, :150].sum(1), below)


class TestVerdict:
    FACTS = BiasFacts(model="0" * 32, model_name="m", layers=(0,), sink_ids=(1,), dtype="float32", offset=9, length=80)

    def judge(self, least: float, error: float, below: float = 0.0, taken: float = 0.0, **facts: Any) -> BiasDirections:
        """The verdict on two heads, of which the second has this share of queries below zero."""

        def both(first: float, second: float) -> Tensor:
            return torch.tensor([[first, second]])

        shares = torch.zeros(1, 2, len(SIZES), dtype=torch.float64)
        place = int((SIZES - least).abs().argmin())
        shares[0, :, place] = 1
        shares[0, 1, place] -= below
        shares[0, 1, 0] = below
        spread = Spread(both(9, 9), both(1, 1), both(error, error), both(1, least), both(1, 2))
        by_position = Spread(*(getattr(spread, name)[..., None].expand(1, 2, 8) for name in Spread.__slots__))
        measured = Measured(
            torch.ones(1, 2, 4), spread, by_position, shares, both(2, 2), both(taken, taken), CAP if taken else None
        )
        sink = (torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
        return judged(measured, replace(self.FACTS, **facts), sink)

    @pytest.mark.parametrize(("least", "level"), [(0.6, 40.0), (0.2, 80.0), (0.1, 160.0)])
    def test_the_level_is_the_first_that_is_low_enough(self, least: float, level: float) -> None:
        found = self.judge(least, 0.06)
        assert found.facts.null_level == level
        assert found.facts.null_weight < 1e-3
        assert found.facts.weights

    def test_a_few_queries_that_see_null_slots_do_not_matter_and_many_do(self) -> None:
        assert self.judge(0.6, 0.06, below=5e-4).facts.null_weight == pytest.approx(5e-4, rel=0.1)
        named = r"layer 0, KV head 1: 0\.60 to 2\.00, deviation 0\.06; layer 0, KV head 0"
        with pytest.raises(ConfigError, match=named):
            self.judge(0.6, 0.06, below=2e-3)

    @pytest.mark.parametrize(("error", "taken", "good"), [(0.1, 0, True), (0.1, 0.1, False), (0.3, 0, False)])
    def test_null_slots_may_be_good_where_weights_are_not(self, error: float, taken: float, good: bool) -> None:
        found = self.judge(0.6, error, taken=taken)
        assert found.facts.weights == good
        assert found.facts.weight_error == pytest.approx(error + taken)
