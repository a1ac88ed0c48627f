"""Tokens are drawn from the distribution that the transformers library would draw from, whoever else is in the step."""

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from m3model.engine.sampling import Kinds, Sampling, uniforms
from m3runtime.config.schema import GenerateConfig

VOCABULARY = 24
DRAWS = 4000

SETTINGS = st.builds(
    GenerateConfig,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, VOCABULARY + 9]),
    top_p=st.sampled_from([0.05, 0.6, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.4, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    presence_penalty=st.sampled_from([0.0, 1.1]),
    logit_bias=st.sampled_from([{}, {3: 2.0, 7: -100.0}]),
)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)


def expected(logits: Tensor, settings: GenerateConfig, prompt: list[int], answer: list[int]) -> Tensor:
    """The probabilities of the next token, by the library's own processors, and OpenAI's formula of penalties."""
    scores = logits.clone()
    for token, bias in settings.logit_bias.items():
        scores[token] += bias
    seen = torch.tensor([[*prompt, *answer]], dtype=torch.int64)
    if seen.numel():
        scores = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(seen, scores[None])[0]
    counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=VOCABULARY)
    scores = scores - settings.frequency_penalty * counts - settings.presence_penalty * (counts > 0)
    if settings.temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(), VOCABULARY).double()
    warpers: Any = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        warpers.append(MinPLogitsWarper(settings.min_p))
    probabilities: Tensor = warpers(seen, scores[None])[0].double().softmax(0)
    return probabilities


@given(SETTINGS, TOKENS, TOKENS, st.integers(0, 2**20))
@settings(max_examples=150, deadline=None)
def test_what_is_drawn_is_the_librarys_distribution(
    generate: GenerateConfig, prompt: list[int], answer: list[int], seed: int
) -> None:
    logits = 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    kinds = Kinds.of([generate])
    sampling = Sampling(torch.device("cpu"), VOCABULARY)
    sampling.reserve(2, kinds)
    sampling.begin(1, generate, prompt, answer)
    # Evenly spread numbers: each token is drawn as often as its probability says, but for one at either end.
    uniform = (torch.arange(DRAWS) + 0.5) / DRAWS
    drawn = sampling.choose(
        logits.expand(DRAWS, -1), torch.full((DRAWS,), 1), uniform, kinds
    ).tokens  # the row of all of them
    found = torch.bincount(drawn, minlength=VOCABULARY) / DRAWS
    wanted = expected(logits, generate, prompt, answer)
    assert (found - wanted).abs().max() < 1.5 / DRAWS
    assert not found[wanted == 0].any()


@given(st.lists(SETTINGS, min_size=2, max_size=5), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_a_row_draws_the_same_alone_and_beside_others(several: list[GenerateConfig], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(several), VOCABULARY, generator=random)
    uniform = torch.rand(len(several), generator=random)
    together = Sampling(torch.device("cpu"), VOCABULARY)
    kinds = Kinds.of(several)
    together.reserve(len(several), kinds)
    for row, one in enumerate(several):
        together.begin(row, one, [1, 2], [row])
    rows = torch.arange(len(several))
    tokens = together.choose(logits, rows, uniform, kinds).tokens
    for row, one in enumerate(several):
        alone = Sampling(torch.device("cpu"), VOCABULARY)
        alone.reserve(1, Kinds.of([one]))
        alone.begin(0, one, [1, 2], [row])
        here = slice(row, row + 1)
        assert (
            alone.choose(logits[here], torch.zeros(1, dtype=torch.int64), uniform[here], Kinds.of([one])).tokens
            == (tokens[row])
        )


def test_what_was_drawn_is_counted_and_moves_with_its_row() -> None:
    generate = GenerateConfig(presence_penalty=2.0)
    kinds = Kinds.of([generate])
    sampling = Sampling(torch.device("cpu"), VOCABULARY)
    sampling.reserve(2, kinds)
    sampling.begin(0, generate, [], [])
    logits = torch.linspace(0, 1, VOCABULARY)[None]
    row, none = torch.tensor([0]), torch.zeros(1)
    assert sampling.choose(logits, row, none, kinds).tokens.item() == VOCABULARY - 1
    assert sampling.choose(logits, row, none, kinds).tokens.item() == VOCABULARY - 2
    sampling.move(0, 1)
    sampling.reserve(5, kinds)
    assert sampling.choose(logits, torch.tensor([1]), none, kinds).tokens.item() == VOCABULARY - 3
    sampling.begin(1, generate, [], [])
    assert sampling.choose(logits, torch.tensor([1]), none, kinds).tokens.item() == VOCABULARY - 1


def test_log_probs_are_of_the_logits_as_they_are() -> None:
    generate = GenerateConfig(temperature=0.5, repetition_penalty=2.0, log_probs=4)
    kinds = Kinds.of([generate, GenerateConfig(log_probs=2)])
    assert kinds.log_probs == 4
    sampling = Sampling(torch.device("cpu"), VOCABULARY)
    sampling.reserve(1, kinds)
    sampling.begin(0, generate, [3], [4])
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3))
    chosen = sampling.choose(logits, torch.tensor([0]), torch.tensor([0.9]), kinds)
    assert chosen.log_probs is not None
    assert chosen.likeliest is not None
    log_probs = logits[0].log_softmax(0)
    assert chosen.log_probs[0] == log_probs[chosen.tokens[0]]
    assert chosen.likeliest[0].tolist() == log_probs.argsort(descending=True)[:4].tolist()


def test_seeds_give_numbers_that_do_not_depend_on_how_many_are_asked_for() -> None:
    assert np.array_equal(uniforms(3, 10), uniforms(3, 200)[:10])
    assert not np.array_equal(uniforms(3, 10), uniforms(4, 10))
    many = uniforms(0, 10_000)
    assert many.min() >= 0
    assert many.max() < 1
