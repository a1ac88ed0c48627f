import copy
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from m3model.transformers import MemoryModel, TransformersAdapter
from m3runtime.adapters.answers import Answer, Prompt
from m3runtime.config.schema import GenerateConfig, MemoryConfig
from m3runtime.errors import BankMismatchError, ConfigError, InputError
from m3runtime.runtime import Runtime
from tests.model.banks import CHUNK, GatedHome, make_runtime
from tests.model.families import TEXT, make_adapter, make_model, make_tokenizer, random_text

FEW_FAMILIES = ["llama", "mistral-sliding", "gemma3_text"]
NEW_TOKENS = 2 * CHUNK + 5
GREEDY = GenerateConfig(max_new_tokens=NEW_TOKENS)
Open = Callable[..., Runtime]


@pytest.fixture
def open_runtime(tmp_path: Path) -> Iterator[Open]:
    """Opens runtimes over banks of ten references, and closes them."""
    with ExitStack() as closing:
        number = 0

        def opened(adapter: TransformersAdapter, **options: Any) -> Runtime:
            nonlocal number
            number += 1
            texts = [random_text(adapter.tokenizer, length, seed=length) for length in range(8, 24, 2)]
            return closing.enter_context(make_runtime(adapter, tmp_path / f"bank-{number}", texts, **options))

        yield opened


def prompts_of(adapter: TransformersAdapter) -> list[Prompt]:
    """Prompts shorter than a chunk, at its end, and of more than two chunks; one with a query of its own."""
    lengths = [5, 2 * CHUNK + 4, CHUNK, 3 * CHUNK + 1]
    prompts = [Prompt(random_text(adapter.tokenizer, length, seed=100 + length)) for length in lengths]
    return [*prompts[:-1], Prompt(prompts[-1].text, query="a map, a bell and a heron")]


def generate(
    adapter: TransformersAdapter,
    runtime: Runtime | None,
    prompts: Sequence[Prompt],
    settings: GenerateConfig = GREEDY,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Answer]:
    if runtime is None:
        return adapter.generate(prompts, None, settings, on_text)
    with ExitStack() as closing:
        streams = [closing.enter_context(runtime.stream(adapter.dtype)) for _ in prompts]
        return adapter.generate(prompts, streams, settings, on_text)


def one(
    adapter: TransformersAdapter, text: str, runtime: Runtime | None = None, **options: Any
) -> tuple[Answer, list[str]]:
    """The answer to one prompt, and the pieces in which it was shown."""
    shown: list[str] = []
    [answer] = generate(
        adapter, runtime, [Prompt(text)], GenerateConfig(**options), lambda _, piece: shown.append(piece)
    )
    return answer, shown


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW_FAMILIES)
def test_without_memories_it_is_the_model_as_it_is(family: str) -> None:
    adapter, model = make_adapter(family), make_model(family)
    adapter.model.config.max_position_embeddings = 600
    prompts = [*prompts_of(adapter), Prompt(random_text(adapter.tokenizer, 530, seed=0))]
    for prompt, answer in zip(prompts, generate(adapter, None, prompts), strict=True):
        ids = torch.tensor([[0, *adapter.tokenizer(prompt.text)["input_ids"]]])
        every = torch.ones_like(ids)
        stock = model.generate(ids, attention_mask=every, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        assert list(answer.tokens) == stock[0, ids.shape[1] :].tolist()
        assert answer.text == adapter.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert answer.stopped_by == "length"
        assert answer.chunks == ()
        assert answer.memories == {}


def spelt_out(adapter: TransformersAdapter, runtime: Runtime, prompt: Prompt) -> tuple[list[int], list[Any]]:
    """What generation has to do for one prompt, token by token."""
    ids = adapter.tokenizer(prompt.text)["input_ids"]
    session = adapter.session(1)
    recalled = []

    def decode(some: list[int]) -> str:
        return str(adapter.tokenizer.decode(some, skip_special_tokens=True))

    def recall(text: str) -> None:
        recalled.append(stream.recall(text))
        session.read([recalled[-1].parts], [recalled[-1].log_weights])

    with runtime.stream(adapter.dtype) as stream:
        for place, token in enumerate(ids):
            if place % CHUNK == 0:
                recall(prompt.query or decode(ids[place : place + CHUNK]))
            logits = session.forward(torch.tensor([[token]]))
        tokens: list[int] = []
        while True:
            assert logits is not None
            tokens.append(int(logits.argmax()))
            if len(tokens) == NEW_TOKENS:
                return tokens, recalled
            if len(tokens) % CHUNK == 0:
                recall(decode(tokens[-CHUNK:]))
            logits = session.forward(torch.tensor([[tokens[-1]]]))


@pytest.mark.parametrize("family", FEW_FAMILIES)
@pytest.mark.parametrize("recall", [{}, {"score_temperature": 0.1, "memories": 3}])
def test_a_sequence_gets_the_same_tokens_alone_and_in_a_batch(
    family: str, recall: dict[str, Any], open_runtime: Open
) -> None:
    adapter = make_adapter(family)
    runtime = open_runtime(adapter, **recall)
    prompts = prompts_of(adapter)
    together = generate(adapter, runtime, prompts)
    backwards = generate(adapter, runtime, prompts[::-1])[::-1]
    for prompt, answer, again in zip(prompts, together, backwards, strict=True):
        tokens, recalled = spelt_out(adapter, runtime, prompt)
        [alone] = generate(adapter, runtime, [prompt])
        for other in [alone, answer, again]:
            assert list(other.tokens) == tokens
            assert [chunk.ids for chunk in other.chunks] == [chunk.ids for chunk in recalled]
    # The test shows nothing unless sequences read other memories than their neighbours, and other ones in every chunk.
    assert len({answer.chunks[-1].ids for answer in together}) > 1
    assert len({chunk.ids for chunk in together[-1].chunks}) > 1


@pytest.mark.parametrize("family", FEW_FAMILIES)
def test_memories_change_what_is_written(family: str, open_runtime: Open) -> None:
    adapter = make_adapter(family)
    prompts = prompts_of(adapter)
    answers = generate(adapter, open_runtime(adapter), prompts)
    nothing = generate(adapter, open_runtime(adapter, min_score=1), prompts)
    assert all(answer.memories for answer in answers)
    assert not any(answer.memories for answer in nothing)
    for answer, other in zip(answers, nothing, strict=True):
        assert answer.tokens != other.tokens


def test_memories_are_recalled_once_a_chunk(open_runtime: Open) -> None:
    adapter = make_adapter()
    runtime = open_runtime(adapter)
    counted = 0
    for prompt_tokens in [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]:
        text = random_text(adapter.tokenizer, prompt_tokens, seed=prompt_tokens)
        for new_tokens in [1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1]:
            answer, _ = one(adapter, text, runtime, max_new_tokens=new_tokens)
            # The first decoded chunk goes on with the memories of the prompt's last chunk; after the last token
            # nothing is recalled.
            expected = math.ceil(prompt_tokens / CHUNK) + (new_tokens - 1) // CHUNK
            assert len(answer.chunks) == expected
            counted += expected
            assert runtime.stats.snapshot().chunks == counted
    assert [len(chunk) for chunk in answer.chunks] == [2] * len(answer.chunks)
    best = answer.chunks[0].ids[0]
    assert answer.memories[best] == max(
        score for chunk in answer.chunks for id, score in zip(chunk.ids, chunk.scores, strict=True) if id == best
    )


def test_a_row_that_stopped_recalls_nothing_more(open_runtime: Open) -> None:
    adapter = make_adapter()
    runtime = open_runtime(adapter)
    prompts = prompts_of(adapter)
    whole = generate(adapter, runtime, prompts)
    stop = whole[0].tokens[2]
    adapter.stop_tokens = frozenset({stop})
    for before, after in zip(whole, generate(adapter, runtime, prompts), strict=True):
        end = before.tokens.index(stop) if stop in before.tokens else None
        assert after.tokens == before.tokens[:end]
        assert after.stopped_by == ("length" if end is None else "token")
        asked = len(before.chunks) - (NEW_TOKENS - 1) // CHUNK + (NEW_TOKENS - 1 if end is None else end) // CHUNK
        assert len(after.chunks) == asked


def test_what_cannot_be_generated_is_refused(open_runtime: Open) -> None:
    adapter = make_adapter()
    runtime = open_runtime(adapter)
    assert adapter.generate([], None, GREEDY) == []
    with pytest.raises(InputError, match="at least one token"):
        generate(adapter, runtime, [Prompt("walnut"), Prompt("")])
    with pytest.raises(InputError, match="2 prompts, but 1 streams"):
        adapter.generate([Prompt("a"), Prompt("b")], [runtime.stream()], GREEDY)


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 0.7}, {"top_k": 20, "repetition_penalty": 1.3}])
def test_equal_seeds_draw_equal_tokens(options: dict[str, Any], open_runtime: Open) -> None:
    adapter = make_adapter()
    runtime = open_runtime(adapter)
    prompts = prompts_of(adapter)
    drawn = GenerateConfig(**{"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "seed": 3, **options})
    together = [answer.tokens for answer in generate(adapter, runtime, prompts, drawn)]
    assert together == [generate(adapter, runtime, [prompt], drawn)[0].tokens for prompt in prompts]
    other = drawn.model_copy(update={"seed": 4})
    assert all(one.tokens != two for one, two in zip(generate(adapter, runtime, prompts, other), together, strict=True))


def test_narrow_sampling_is_greedy() -> None:
    adapter = make_adapter()
    text = prompts_of(adapter)[0].text
    greedy, _ = one(adapter, text, max_new_tokens=NEW_TOKENS)
    for options in [{"top_k": 1, "temperature": 5.0}, {"top_p": 1e-6, "temperature": 1.0}, {"temperature": 1e-4}]:
        narrow, _ = one(adapter, text, max_new_tokens=NEW_TOKENS, seed=11, **options)
        assert narrow.tokens == greedy.tokens


@pytest.mark.parametrize(
    ("options", "likeliest"), [({"top_k": 3}, 3), ({"top_p": 0.3}, None), ({"temperature": 2.0}, None)]
)
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(
    options: dict[str, Any], likeliest: int | None
) -> None:
    adapter = make_adapter()
    text = prompts_of(adapter)[0].text
    session = adapter.session(1, memories=False)
    logits = session.forward(torch.tensor([[0, *adapter.tokenizer(text)["input_ids"]]]))
    assert logits is not None
    chances = (logits[0] / options.get("temperature", 1.0)).softmax(0)
    order = chances.argsort(descending=True)
    if likeliest is None:
        likeliest = int((chances[order].cumsum(0) < options.get("top_p", 1.0)).sum()) + 1
    kept = torch.zeros_like(chances)
    kept[order[:likeliest]] = chances[order[:likeliest]]
    kept /= kept.sum()
    first = [
        one(adapter, text, max_new_tokens=1, seed=seed, **{"temperature": 1.0, **options})[0].tokens[0]
        for seed in range(150)
    ]
    counts = torch.bincount(torch.tensor(first), minlength=len(kept))
    assert not counts[kept == 0].any()
    # The likeliest token's count lies within five standard deviations.
    chance = float(kept[order[0]])
    assert abs(int(counts[order[0]]) - 150 * chance) < 5 * math.sqrt(150 * chance * (1 - chance)) + 1


def test_a_repetition_penalty_counts_the_prompt() -> None:
    adapter = make_adapter()
    text = prompts_of(adapter)[1].text
    prompt = set(adapter.tokenizer(text)["input_ids"])
    answer, _ = one(adapter, text, max_new_tokens=NEW_TOKENS, repetition_penalty=1e6)
    assert len(set(answer.tokens)) == NEW_TOKENS
    assert not prompt & set(answer.tokens)


# -- text -------------------------------------------------------------------------------------------------------------


def scripted(text: str, *, stops: bool = True) -> TransformersAdapter:
    """A model that writes ``text`` after any of its tokens, and then stops or begins again.

    Its next token depends on the last one alone: embeddings are the unit vectors, layers add nothing, and the head
    has a one for each token and its successor.
    """
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokens = tokenizer(text)["input_ids"]
    assert len(set(tokens)) == len(tokens), "a token has only one successor"
    model = make_model("llama")
    config = copy.deepcopy(model.config)
    config.update({"hidden_size": size, "head_dim": size // 4, "num_hidden_layers": 1, "intermediate_size": 8})
    made = type(model)(config).eval()
    successor = torch.full((size,), tokens[0])
    end = tokenizer.eos_token_id if stops else tokens[0]
    successor[tokens] = torch.tensor([*tokens[1:], end])
    with torch.no_grad():
        made.model.layers[0].self_attn.o_proj.weight.zero_()
        made.model.layers[0].mlp.down_proj.weight.zero_()
        made.model.embed_tokens.weight.copy_(torch.eye(size))
        made.lm_head.weight.copy_(torch.nn.functional.one_hot(successor, size).T)
    return TransformersAdapter(made, tokenizer, MemoryConfig(), "scripted")


def test_a_stop_token_ends_the_text() -> None:
    adapter = scripted("lamp of wax")
    assert adapter.stop_tokens == {adapter.tokenizer.eos_token_id}
    answer, shown = one(adapter, "?")
    assert (answer.text, answer.stopped_by) == ("lamp of wax", "token")
    assert "".join(shown) == answer.text
    assert adapter.tokenizer.eos_token_id not in answer.tokens
    length = len(answer.tokens)
    assert one(adapter, "?", max_new_tokens=length)[0].stopped_by == "length"
    assert one(adapter, "?", max_new_tokens=length + 1)[0].stopped_by == "token"


def test_a_row_that_has_stopped_shows_all_of_its_text_at_once() -> None:
    adapter = scripted("lamp of wax")
    events: list[tuple[int, str]] = []
    prompts = [Prompt(" of"), Prompt("?")]  # of which one is the text's own, and stops earlier
    answers = adapter.generate(prompts, None, GenerateConfig(stop=["x!"]), lambda row, text: events.append((row, text)))
    assert len(answers[0].tokens) < len(answers[1].tokens)
    # The x is held back, for it may begin the stop text; the shorter row's is shown before the other has stopped.
    ends = [row for row, text in events if text.endswith("x")]
    assert ends == [0, 1]
    assert events[-1][0] == 1
    assert events.index((0, "x")) < len(events) - 2


def test_a_stop_text_ends_the_text_before_it() -> None:
    adapter = scripted("lamp of wax")
    for stop, text in {"of": "lamp ", "p of w": "lam", "lamp": "", "x": "lamp of wa", "absent": "lamp of wax"}.items():
        answer, shown = one(adapter, "?", stop=[stop])
        assert answer.text == text
        assert "".join(shown) == text
        assert answer.stopped_by == ("token" if stop == "absent" else "text")
    assert one(adapter, "?", stop=["wax", "p o", "of"])[0].text == "lam"


def test_a_character_is_shown_whole() -> None:
    text = "né65€ 😀!"
    adapter = scripted(text)
    answer, shown = one(adapter, "?")
    assert answer.text == text
    assert "".join(shown) == text
    assert "\ufffd" not in "".join(shown)
    assert len(answer.tokens) > len(shown)
    assert [one(adapter, "?", stop=[stop])[0].text for stop in ("€", "5€ 😀", "é")] == ["né65", "né6", "n"]
    _, before = one(adapter, "?", stop=["5€"])
    assert "".join(before) == "né6"


class Writer:
    """A random model, and what it writes by seed."""

    def __init__(self) -> None:
        self.adapter = make_adapter()
        self.tokens: dict[int, tuple[int, ...]] = {}

    def write(self, seed: int, stop: Sequence[str] = ()) -> tuple[Answer, list[str]]:
        return one(self.adapter, "lamp", max_new_tokens=40, temperature=1.0, seed=seed, stop=stop)

    def texts(self, seed: int) -> list[str]:
        """The text after each token."""
        if seed not in self.tokens:
            self.tokens[seed] = self.write(seed)[0].tokens
        tokens = self.tokens[seed]
        return [
            self.adapter.tokenizer.decode(tokens[: end + 1], skip_special_tokens=True) for end in range(len(tokens))
        ]


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer()


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # half characters are common in random text
@given(seed=st.integers(0, 5), places=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=3))
@example(seed=1, places=[(2, 3), (3, 1)])  # the one that begins later is complete earlier
def test_what_is_shown_is_the_answer(writer: Writer, seed: int, places: list[tuple[int, int]]) -> None:
    texts = writer.texts(seed)
    stop = [texts[-1][start % len(texts[-1]) :][:length] for start, length in places]
    assume("\ufffd" not in "".join(stop))  # which half a character looks like
    answer, shown = writer.write(seed, stop)
    ends = [(text, [text.find(word) for word in stop if word in text]) for text in texts]
    assert answer.text == next((text[: min(found)] for text, found in ends if found), texts[-1])
    assert answer.stopped_by == ("text" if stop else "length")
    assert "".join(shown) == answer.text
    assert "" not in shown
    settings = GenerateConfig(max_new_tokens=40, temperature=1, seed=seed, stop=tuple(stop))
    assert writer.adapter.generate([Prompt("lamp")], None, settings)[0].text == answer.text  # nobody watching


# -- blocks that are late ---------------------------------------------------------------------------------------------


@pytest.fixture
def gated(open_runtime: Open) -> Iterator[Callable[..., tuple[Runtime, GatedHome]]]:
    homes: list[GatedHome] = []

    def opened(adapter: TransformersAdapter, **options: Any) -> tuple[Runtime, GatedHome]:
        runtime = open_runtime(adapter, home=GatedHome, deadline=0.02, **options)
        assert isinstance(runtime.bank.home, GatedHome)
        homes.append(runtime.bank.home)
        return runtime, homes[-1]

    yield opened
    for home in homes:
        home.gate.set()


Gated = Callable[..., tuple[Runtime, GatedHome]]


def until_held(runtime: Runtime, ids: Sequence[int]) -> None:
    while not runtime.hierarchy.held(np.array(ids, np.uint64)).all():
        time.sleep(0.001)


@pytest.mark.parametrize("when_late", ["skip", "next_chunk"])
def test_what_is_late_is_skipped_or_given_to_the_next_chunk(when_late: str, gated: Gated) -> None:
    adapter = make_adapter()
    runtime, home = gated(adapter, when_late=when_late, memories=1)
    one_text, other_text = (reference.text for reference in runtime.references([0, 7]) if reference)
    [[first]], [[second]] = runtime.search([one_text]), runtime.search([other_text])
    assert first.id != second.id
    with runtime.stream() as stream:
        home.gate.clear()
        recalled = stream.recall(one_text)
        assert (recalled.ids, recalled.late, recalled.parts) == ((), (first.id,), ())
        assert runtime.stats.snapshot().late == 1
        assert runtime.stats.snapshot().memories == 0
        home.gate.set()
        until_held(runtime, [first.id])
        # A text without anything to recall of its own: what is owed comes.
        late = stream.recall(" ")
        assert late.ids == ((first.id,) if when_late == "next_chunk" else ())
        assert late.late == ()
        assert stream.recall(one_text).ids == (first.id,)
        assert runtime.stats.snapshot().late == 1
        assert stream.recall(" ").ids == ()  # owed once


def test_waiting_waits(gated: Gated) -> None:
    adapter = make_adapter()
    runtime, home = gated(adapter, when_late="wait", memories=1)
    with runtime.stream() as stream:
        home.gate.clear()
        opener = threading.Timer(0.2, home.gate.set)
        opener.start()
        recalled = stream.recall("walnut oil")
        opener.join()
        assert len(recalled) == 1
        assert recalled.late == ()
        home.gate.clear()
        assert stream.recall("walnut oil").ids == recalled.ids  # held already: nothing to wait for
        assert runtime.stats.snapshot().kept == 1


def test_what_one_stream_holds_is_not_late_for_another(gated: Gated) -> None:
    adapter = make_adapter()
    runtime, home = gated(adapter, when_late="skip", memories=1, blocks=1)
    texts = [reference.text for reference in runtime.references([0, 7]) if reference]
    with runtime.stream() as one_stream, runtime.stream() as other_stream:
        held = one_stream.recall(texts[0], wait=True)
        home.gate.clear()
        both = runtime.recall([one_stream, other_stream], [texts[0], texts[0]])
        assert [recalled.ids for recalled in both] == [held.ids, held.ids]
        mixed = runtime.recall([one_stream, other_stream], [texts[0], texts[1]])
        assert mixed[0].ids == held.ids
        assert mixed[0].late == ()
        assert mixed[1].ids == ()
        assert len(mixed[1].late) == 1


def test_generation_does_not_wait_for_a_home_that_hangs(gated: Gated) -> None:
    adapter = make_adapter()
    runtime, home = gated(adapter, when_late="skip", blocks=2, memories=1)
    prompt = prompts_of(adapter)[1]
    # The prompt waits for its memories; as soon as the first text is shown, the home hangs.
    [answer] = generate(
        adapter,
        runtime,
        [prompt],
        GenerateConfig(max_new_tokens=6 * CHUNK, temperature=1.0),
        lambda *_: home.gate.clear(),
    )
    assert len(answer.tokens) == 6 * CHUNK
    late = [chunk.late for chunk in answer.chunks]
    assert not any(late[: math.ceil((2 * CHUNK + 4) / CHUNK)])
    assert any(late)
    assert runtime.stats.snapshot().late == sum(map(len, late))
    home.gate.set()
    again = generate(adapter, runtime, [prompt])[0]
    assert not any(chunk.late for chunk in again.chunks[:3])


# -- a bank and its model ---------------------------------------------------------------------------------------------


def test_a_bank_of_another_model_is_refused(open_runtime: Open) -> None:
    adapter = make_adapter()
    runtime = open_runtime(adapter)
    MemoryModel(adapter, runtime)
    MemoryModel(make_adapter(tokenizer=make_tokenizer(eos=False, bos_in_chat=True)), runtime)
    other_tokenizer = make_tokenizer(eos=False, text=TEXT[::-1])
    assert len(other_tokenizer) == len(make_tokenizer())
    others = {
        r"another model \(llama, \w{8}\), not llama \(\w{8}\)": make_adapter(model=make_model("llama", seed=1)),
        r"another model \(llama, \w{8}\), not mistral-sliding": make_adapter("mistral-sliding"),
        "another tokenizer": make_adapter(tokenizer=other_tokenizer),
        "the sink 'Reference:', not 'Note:'": make_adapter(sink="Note:"),
        r"another spec: layers \[0, 1, 2, 3\] against \[0, 1\];": make_adapter(layers="first-half"),
        "tokens 24 against 25, reference_tokens 24 against 25;": make_adapter(reference_tokens=25),
    }
    for difference, other in others.items():
        with pytest.raises(BankMismatchError, match=difference) as caught:
            MemoryModel(other, runtime)
        assert "\n" not in str(caught.value)


def test_memory_model(open_runtime: Open) -> None:
    adapter = make_adapter()
    runtime = open_runtime(adapter, generate={"max_new_tokens": 9, "prompt": "plain"})
    model, bare = MemoryModel(adapter, runtime), MemoryModel(adapter)
    answer = model.generate("the old lamp")
    assert answer.tokens == generate(adapter, runtime, [Prompt("the old lamp")])[0].tokens[:9]
    assert len(answer.tokens) == 9
    assert len(model.generate("the old lamp", max_new_tokens=4).tokens) == 4
    assert [one.tokens for one in model.generate(["the old lamp", "a heron"])] == [
        model.generate(text).tokens for text in ("the old lamp", "a heron")
    ]
    assert model.generate([]) == []
    assert bare.generate("the old lamp", prompt="plain").tokens != answer.tokens
    shown: list[str] = []
    messages = [{"role": "user", "content": "Which lamp?"}]
    chatted = model.chat(messages, on_text=shown.append)
    assert "".join(shown) == chatted.text
    asked = model.generate("Which lamp?", prompt="chat")
    assert asked.tokens == chatted.tokens
    assert [chunk.ids for chunk in chatted.chunks] == [chunk.ids for chunk in asked.chunks]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"^generate\.max_new_tokens must be greater than or equal to 1, not 0$"),
        ({"max_tokens": 3}, r"^generate\.max_tokens is not known; did you mean generate\.max_new_tokens\?$"),
        ({"prompt": "poem"}, r"^generate\.prompt must be"),
        ({"stop": [""]}, r"^generate\.stop must"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryModel(make_adapter()).generate("?", **options)


def test_a_prompt_begins_with_one_beginning() -> None:
    """BOS stands in the sink, if there is one, and before the prompt, if not; a template may write it as well."""
    message = [{"role": "user", "content": "lamp"}]
    for tokenizer in [make_tokenizer(), make_tokenizer(bos_in_chat=True)]:
        adapter = make_adapter(tokenizer=tokenizer)
        assert adapter.sink_ids == [0, *tokenizer("Reference:")["input_ids"]]
        prompt = adapter.chat(message)
        assert adapter.tokens.of_prompt(prompt, sink=True).count(0) == 0
        assert adapter.tokens.of_prompt(prompt, sink=False).count(0) == 1
        assert adapter.tokens.of_prompt(prompt, sink=False)[1:] == adapter.tokens.of_prompt(prompt, sink=True)
    # Where it also begins every turn, as in SmolLM2, the first turn keeps it.
    turns = Prompt("<s>user lamp</s><s>assistant")
    assert adapter.tokens.of_prompt(turns, sink=True).count(0) == 2
    assert adapter.tokens.of_prompt(turns, sink=False).count(0) == 2


def test_a_model_without_chat_template_says_so() -> None:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = None
    model = MemoryModel(make_adapter(tokenizer=tokenizer))
    with pytest.raises(ConfigError, match="no chat template; use question or plain"):
        model.generate("Which lamp?", prompt="chat")
    with pytest.raises(ConfigError, match="no chat template, so it cannot chat; ask single questions with `m3 ask`"):
        model.chat([{"role": "user", "content": "Which lamp?"}])
    with pytest.raises(InputError, match="at least one message"):
        model.chat([])


@pytest.mark.parametrize("bos_in_chat", [False, True])
def test_memories_in_the_users_turn_stand_where_their_text_would(bos_in_chat: bool, open_runtime: Open) -> None:
    tokenizer = make_tokenizer(eos=False, bos_in_chat=bos_in_chat)
    adapter = make_adapter(tokenizer=tokenizer, place="turn")
    assert adapter.sink_ids.count(tokenizer.bos_token_id) == 1
    assert adapter.sink_ids[0] == tokenizer.bos_token_id
    runtime = open_runtime(adapter)
    model = MemoryModel(adapter, runtime)
    answer = model.generate("Which lamp?", prompt="chat", max_new_tokens=3)
    assert answer.chunks[0].ids
    # What the model reads, sink, reference and prompt, is the template's text with the reference in the user's turn.
    whole = adapter.render("Which lamp?", "chat", ["the old town"]).text
    prompt = adapter.tokens.of_prompt(adapter.render("Which lamp?", "chat"), sink=True)
    read = tokenizer.decode(adapter.sink_ids) + " the old town" + tokenizer.decode(prompt)
    assert read.replace(" ", "").removeprefix("<s>") == whole.replace(" ", "").removeprefix("<s>")
    # The user's later turns follow, and nothing else than such a conversation is read.
    model.chat(
        [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    )
    for other in (Prompt("Which lamp?"), adapter.chat([{"role": "system", "content": "Be brief."}])):
        with pytest.raises(ConfigError, match=r"memory\.place is turn"), runtime.stream(adapter.dtype) as stream:
            adapter.generate([other], [stream], GREEDY)
    # Without memories it is the model as it is.
    assert adapter.generate([Prompt("Which lamp?")], None, GREEDY)[0].tokens
    assert MemoryModel(make_adapter(tokenizer=tokenizer)).generate("Which lamp?", prompt="chat", max_new_tokens=3).text


def test_a_template_without_a_turn_to_stand_in_is_refused() -> None:
    for template, complaint in [(None, "has no chat template"), ("{{ messages[0].content | upper }}", "changes the")]:
        tokenizer = copy.deepcopy(make_tokenizer())
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=rf"memory\.place: this model.* {complaint}"):
            make_adapter(tokenizer=tokenizer, place="turn")
