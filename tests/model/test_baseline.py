"""The model as transformers' own `generate` runs it: what it writes is what ours writes, in every variant."""

import pytest

from m3model.attention.implementation import IMPLEMENTATION
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import GenerateConfig
from m3runtime.lab.bench.comparison import Comparable
from tests.model.families import make_adapter, make_tokenizer

PROMPTS = [Prompt("the harbour lamp of the old town"), Prompt("seven keepers rowed out with blue lanterns and")]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2-sliding", "gemma2"])
def test_every_variant_writes_what_ours_writes(family: str) -> None:
    adapter = make_adapter(family)
    assert isinstance(adapter, Comparable)
    baseline = adapter.baseline()
    ours = baseline.endless().generate(PROMPTS, None, GenerateConfig(max_new_tokens=8))
    for variant in baseline.variants:
        if family == "gemma2" and variant.startswith("sdpa"):
            continue  # which leaves out the model's soft cap
        run = baseline.generate(PROMPTS, 8, variant, room=40)
        assert run.tokens == tuple(answer.tokens for answer in ours), variant
        assert 0 < run.first_token_s <= run.seconds


def test_padding_changes_nothing() -> None:
    baseline = make_adapter().baseline()
    for variant in baseline.variants:
        alone = [baseline.generate([prompt], 6, variant, room=40).tokens[0] for prompt in PROMPTS]
        assert list(baseline.generate(PROMPTS, 6, variant, room=40).tokens) == alone


def test_an_end_does_not_end_it() -> None:
    adapter = make_adapter(tokenizer=make_tokenizer())
    settings = GenerateConfig(max_new_tokens=8)
    baseline = adapter.baseline()
    written = baseline.generate(PROMPTS[:1], 8, "sdpa, dynamic", room=40).tokens[0]
    adapter.stop_tokens = frozenset(written[2:3])  # as if that were the end
    adapter.model.generation_config.eos_token_id = written[2]
    (ended,) = adapter.generate(PROMPTS[:1], None, settings)
    assert ended.stopped_by == "token"
    for endless in (baseline.endless(), adapter.baseline().endless()):
        assert endless.generate(PROMPTS[:1], None, settings)[0].tokens == written
    assert baseline.generate(PROMPTS[:1], 8, "sdpa, dynamic", room=40).tokens[0] == written


def test_the_model_is_left_as_it_was() -> None:
    adapter = make_adapter()
    own = adapter.model.generation_config
    with pytest.raises((ValueError, ImportError)):
        adapter.baseline().generate(PROMPTS, 4, "no such attention, dynamic", room=40)
    adapter.baseline().generate(PROMPTS, 4, "eager, static", room=40)
    assert adapter.model.config._attn_implementation == IMPLEMENTATION
    assert adapter.model.generation_config is own


def test_weights_that_a_step_reads() -> None:
    for family, is_tied in (("llama", False), ("llama-tied", True)):
        adapter = make_adapter(family)
        size = sum(parameter.nbytes for parameter in adapter.model.parameters())
        embedding = adapter.model.get_input_embeddings().weight
        assert adapter.baseline().weight_bytes == size - (0 if is_tied else embedding.nbytes)
