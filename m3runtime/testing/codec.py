"""`CodecContract`: the laws of a codec."""

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3runtime.codecs.base import Codec, Distortion
from m3runtime.errors import BlockError, CodecError
from m3runtime.memory import Memories
from m3runtime.spec import MemorySpec

SPEC = MemorySpec(layers=(0, 2, 3), kv_heads=2, tokens=12, head_dim=16, reference_tokens=12, dtype="float32")
OTHER_SPECS = (
    MemorySpec(layers=(0, 2), kv_heads=2, tokens=12, head_dim=16, reference_tokens=12, dtype="float32"),
    MemorySpec(layers=(0, 2, 4), kv_heads=2, tokens=12, head_dim=16, reference_tokens=12, dtype="float32"),
    MemorySpec(layers=(0, 2, 3), kv_heads=2, tokens=12, head_dim=16, reference_tokens=12, dtype="float16"),
)
OUT = (torch.float32, torch.float16, torch.bfloat16)


def make_memories(tokens: list[int], seed: int = 0, spec: MemorySpec = SPEC) -> Memories:
    """Random memories of so many tokens each, with an offset for each channel as keys have it.

    What lies beyond a memory's tokens is NaN, so that whoever reads it is found out.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (len(tokens), len(spec.layers), spec.kv_heads, max(tokens, default=0), spec.head_dim)
    channels = torch.randn(2, 1, *shape[1:3], 1, shape[4], generator=torch.Generator().manual_seed(7))
    keys, values = channels * torch.tensor([3.0, 0.5]).view(2, 1, 1, 1, 1, 1) + torch.randn(2, *shape, generator=random)
    for i, own in enumerate(tokens):
        keys[i, :, :, own:] = values[i, :, :, own:] = torch.nan
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return Memories(keys.to(dtype), values.to(dtype), torch.tensor(tokens, dtype=torch.int64))


def rows(memories: Memories, which: slice) -> Memories:
    """Some of these memories."""
    return Memories(memories.keys[which], memories.values[which], memories.tokens[which])


def identical(a: Memories, b: Memories) -> bool:
    """Whether two batches are equal bit by bit."""
    same = torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    return same and torch.equal(a.tokens, b.tokens) and a.keys.dtype == b.keys.dtype


def noise(count: int, size: int, seed: int) -> Tensor:
    """``uint8[count, size]``, any bytes."""
    return torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class CodecContract(ABC):
    """Subclass it as ``TestMyCodec``, make the codec, and say how much of a random memory it may lose."""

    trains: ClassVar[bool] = False
    """Whether the codec must be trained before use."""
    worst: ClassVar[Distortion]
    """The most distortion on the memories of `make_memories`, white noise on an offset: the hardest there are."""

    @classmethod
    @abstractmethod
    def make(cls, spec: MemorySpec) -> Codec:
        """A new codec, not trained."""

    @classmethod
    def fitted(cls) -> Codec:
        """A new codec, trained on a sample that is always the same."""
        codec = cls.make(SPEC)
        codec.fit(make_memories([12, 9, 12, 7] * 12, seed=1))
        return codec

    @pytest.fixture(scope="class")
    @classmethod
    def codec(cls) -> Codec:
        """A trained codec that no test changes."""
        return cls.fitted()

    # Bytes

    def test_encoding_is_deterministic(self, codec: Codec) -> None:
        payloads = codec.encode(make_memories([12, 5, 1]))
        assert payloads.dtype == torch.uint8
        assert payloads.shape == (3, codec.payload_bytes(SPEC.tokens))
        assert payloads.device.type == "cpu"
        assert torch.equal(payloads, codec.encode(make_memories([12, 5, 1])))

    def test_a_longer_memory_takes_no_fewer_bytes(self, codec: Codec) -> None:
        sizes = [codec.payload_bytes(tokens) for tokens in range(1, SPEC.tokens + 1)]
        assert sizes == sorted(sizes)
        assert sizes[0] > 0

    def test_a_payload_ends_where_it_says_and_zeros_follow(self, codec: Codec) -> None:
        tokens = [12, 5, 1]
        for payload, own in zip(codec.encode(make_memories(tokens)), tokens, strict=True):
            assert not payload[codec.payload_bytes(own) :].any()

    def test_the_bytes_of_its_own_length_are_enough(self, codec: Codec) -> None:
        memory = make_memories([5])
        payload = codec.encode(memory)
        short = codec.decode(payload[:, : codec.payload_bytes(5)], memory.tokens, torch.float32)
        assert identical(short, codec.decode(payload, memory.tokens, torch.float32))

    def test_no_memories_are_no_bytes(self, codec: Codec) -> None:
        empty = rows(make_memories([12]), slice(0, 0))
        payloads = codec.encode(empty)
        assert payloads.shape == (0, codec.payload_bytes(SPEC.tokens))
        assert len(codec.decode(payloads, empty.tokens, torch.float32)) == 0

    # A memory and its neighbours

    def test_encoding_does_not_depend_on_the_batch(self, codec: Codec) -> None:
        memories = make_memories([12, 3, 8, 12, 1, 11])
        together = codec.encode(memories)
        for i in range(len(memories)):
            assert torch.equal(codec.encode(rows(memories, slice(i, i + 1))), together[i : i + 1])

    def test_encoding_reads_no_token_that_does_not_exist(self, codec: Codec) -> None:
        long, short = make_memories([12, 4]), make_memories([12, 4])
        for x in (short.keys, short.values):
            x[1, :, :, 4:] = 1e4
        assert torch.equal(codec.encode(long), codec.encode(short))

    def test_encoding_does_not_depend_on_strides(self, codec: Codec) -> None:
        memories = make_memories([12, 4])
        keys, values = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (memories.keys, memories.values))
        assert torch.equal(codec.encode(Memories(keys, values, memories.tokens)), codec.encode(memories))

    @pytest.mark.parametrize("dtype", OUT)
    def test_decoding_does_not_depend_on_the_batch(self, codec: Codec, dtype: torch.dtype) -> None:
        memories = make_memories([12, 3, 8, 12, 1, 11])
        payloads = codec.encode(memories)
        together = codec.decode(payloads, memories.tokens, dtype)
        for i, own in enumerate(memories.tokens.tolist()):
            alone = codec.decode(payloads[i : i + 1], memories.tokens[i : i + 1], dtype)
            assert alone.keys.shape[3] == own
            assert torch.equal(alone.keys[0], together.keys[i, :, :, :own])
            assert torch.equal(alone.values[0], together.values[i, :, :, :own])

    def test_what_follows_a_payload_in_its_slot_does_not_matter(self, codec: Codec) -> None:
        memories = make_memories([12, 3, 8])
        payloads = codec.encode(memories)
        slots = noise(3, 5 + payloads.shape[1] + 30, seed=0)  # neither aligned nor contiguous
        for slot, payload, own in zip(slots, payloads, memories.tokens.tolist(), strict=True):
            size = codec.payload_bytes(own)
            slot[5 : 5 + size] = payload[:size]
        decoded = codec.decode(slots[:, 5:], memories.tokens, torch.float32)
        assert identical(decoded, codec.decode(payloads, memories.tokens, torch.float32))

    def test_threads_share_a_codec(self, codec: Codec) -> None:
        batches = [make_memories([12, i + 1], seed=i) for i in range(8)]
        wanted = [codec.encode(batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            assert all(map(torch.equal, pool.map(codec.encode, batches), wanted))

    # Values

    @pytest.mark.parametrize("dtype", OUT)
    def test_decoded_memories_have_their_shape_and_dtype_and_zeros_beyond(
        self, codec: Codec, dtype: torch.dtype
    ) -> None:
        memories = make_memories([9, 3])
        decoded = codec.decode(codec.encode(memories), memories.tokens, dtype)
        assert decoded.keys.shape == decoded.values.shape == (2, 3, 2, 9, 16)
        assert decoded.keys.dtype == decoded.values.dtype == dtype
        assert torch.equal(decoded.tokens, memories.tokens)
        assert not decoded.keys[1, :, :, 3:].any()
        assert not decoded.values[1, :, :, 3:].any()

    def test_smaller_dtypes_are_the_same_values_rounded(self, codec: Codec) -> None:
        memories = make_memories([9, 3])
        payloads = codec.encode(memories)
        exact = codec.decode(payloads, memories.tokens, torch.float32)
        for dtype, tolerance in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)):
            rounded = codec.decode(payloads, memories.tokens, dtype)
            torch.testing.assert_close(rounded.keys.float(), exact.keys, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(rounded.values.float(), exact.values, rtol=tolerance, atol=tolerance)

    def test_distortion_is_within_its_bound(self, codec: Codec) -> None:
        measured = codec.distortion(make_memories([12, 5, 9, 12, 12, 1], seed=2))
        assert measured.keys <= self.worst.keys
        assert measured.values <= self.worst.values

    @pytest.mark.parametrize("dtype", OUT)
    def test_memories_of_any_dtype_are_encoded(self, codec: Codec, dtype: torch.dtype) -> None:
        memories = make_memories([9, 3])
        small = Memories(memories.keys.to(dtype), memories.values.to(dtype), memories.tokens)
        wide = Memories(small.keys.float(), small.values.float(), memories.tokens)
        assert torch.equal(codec.encode(small), codec.encode(wide))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_the_accelerator_decodes_to_the_same_values(self, codec: Codec) -> None:
        memories = make_memories([12, 5, 9])
        payloads = codec.encode(memories)
        here = codec.decode(payloads, memories.tokens, torch.float32)
        there = codec.decode(payloads.cuda(), memories.tokens, torch.float32)
        assert there.keys.is_cuda
        torch.testing.assert_close(there.keys.cpu(), here.keys, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(there.values.cpu(), here.values, rtol=1e-6, atol=1e-6)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_the_accelerator_encodes_as_well(self, codec: Codec) -> None:
        memories = make_memories([12, 5, 9], seed=2)
        there = codec.encode(Memories(memories.keys.cuda(), memories.values.cuda(), memories.tokens))
        assert there.device.type == "cpu"
        different = (there != codec.encode(memories)).float().mean()
        assert float(different) < 0.01  # between centroids as near as rounding, either may be chosen

    # Bytes that nobody encoded

    # Each subclass runs it with a codec of its own, and finds its own examples.
    @settings(suppress_health_check=[HealthCheck.differing_executors])
    @given(seed=st.integers(0, 2**32), tokens=st.lists(st.integers(1, 12), min_size=1, max_size=3))
    def test_any_bytes_decode_to_finite_values_or_are_refused(self, codec: Codec, seed: int, tokens: list[int]) -> None:
        payloads = noise(len(tokens), codec.payload_bytes(max(tokens)), seed)
        for dtype in OUT:
            try:
                decoded = codec.decode(payloads, torch.tensor(tokens), dtype)
            except BlockError:
                continue
            assert torch.isfinite(decoded.keys).all()
            assert torch.isfinite(decoded.values).all()

    @pytest.mark.parametrize("byte", [0x00, 0x7B, 0x7F, 0x80, 0xFB, 0xFF])
    def test_bytes_that_are_all_the_same(self, codec: Codec, byte: int) -> None:
        payloads = torch.full((1, codec.payload_bytes(12)), byte, dtype=torch.uint8)
        for dtype in OUT:
            try:
                decoded = codec.decode(payloads, torch.tensor([12]), dtype)
            except BlockError:
                continue
            assert torch.isfinite(decoded.keys).all()
            assert torch.isfinite(decoded.values).all()

    @pytest.mark.parametrize("tokens", [0, -1, 13])
    def test_a_number_of_tokens_that_cannot_be_is_refused(self, codec: Codec, tokens: int) -> None:
        with pytest.raises(BlockError, match="between 1 and 12 tokens"):
            codec.decode(noise(1, codec.payload_bytes(12), 0), torch.tensor([tokens]), torch.float32)

    def test_a_payload_that_is_too_short_is_refused(self, codec: Codec) -> None:
        with pytest.raises(BlockError, match="too short"):
            codec.decode(noise(1, codec.payload_bytes(12) - 1, 0), torch.tensor([12]), torch.float32)

    # Memories that cannot be encoded

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("part", ["keys", "values"])
    def test_values_that_are_not_finite_are_refused(self, codec: Codec, part: str, value: float) -> None:
        memories = make_memories([12, 5])
        getattr(memories, part)[1, 2, 1, 4, 15] = value
        with pytest.raises(CodecError, match="not finite"):
            codec.encode(memories)

    @pytest.mark.parametrize("spec", OTHER_SPECS[:1])
    def test_memories_of_another_shape_are_refused(self, codec: Codec, spec: MemorySpec) -> None:
        with pytest.raises(CodecError, match="do not fit"):
            codec.encode(make_memories([12], spec=spec))

    def test_an_untrained_codec_is_refused(self, tmp_path: Path) -> None:
        codec = self.make(SPEC)
        assert codec.trained is not self.trains
        if not self.trains:
            return
        with pytest.raises(CodecError):
            codec.encode(make_memories([12]))
        with pytest.raises(CodecError):
            codec.decode(noise(1, codec.payload_bytes(12), 0), torch.tensor([12]), torch.float32)
        with pytest.raises(CodecError):
            codec.save(tmp_path / "codec")
        with pytest.raises(CodecError):
            _ = codec.fingerprint

    # Files

    def test_a_saved_codec_is_the_same_codec(self, codec: Codec, tmp_path: Path) -> None:
        codec.save(tmp_path / "codec")
        loaded = type(codec).load(tmp_path / "codec", SPEC)
        memories = make_memories([12, 5])
        payloads = codec.encode(memories)
        assert loaded.trained
        assert loaded.options == codec.options
        assert loaded.fingerprint == codec.fingerprint
        assert torch.equal(loaded.encode(memories), payloads)
        assert identical(
            loaded.decode(payloads, memories.tokens, torch.float32),
            codec.decode(payloads, memories.tokens, torch.float32),
        )
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "codec").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "codec"]

    def test_training_is_deterministic(self, codec: Codec) -> None:
        again = self.fitted()
        assert len(bytes.fromhex(again.fingerprint)) == 16
        assert again.fingerprint == codec.fingerprint

    @pytest.mark.parametrize("spec", OTHER_SPECS)
    def test_a_file_of_another_spec_is_refused(self, codec: Codec, spec: MemorySpec, tmp_path: Path) -> None:
        codec.save(tmp_path / "codec")
        with pytest.raises(CodecError, match=r"codec: .* of another spec"):
            type(codec).load(tmp_path / "codec", spec)

    def test_a_file_with_a_wrong_byte_is_refused(self, codec: Codec, tmp_path: Path) -> None:
        path = tmp_path / "codec"
        codec.save(path)
        good = path.read_bytes()
        head = 8 + int.from_bytes(good[:8], "little")
        for at in [*range(head), *range(head, len(good), max(1, len(good) // 50)), len(good) - 1]:
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            with pytest.raises(CodecError, match=r"codec: "):
                type(codec).load(path, SPEC)

    def test_a_file_of_another_length_is_refused(self, codec: Codec, tmp_path: Path) -> None:
        path = tmp_path / "codec"
        codec.save(path)
        good = path.read_bytes()
        for bad in (b"", good[:7], good[:100], good[:-1], good + b"\0", b"\xff" * 8 + good[8:]):
            path.write_bytes(bad)
            with pytest.raises(CodecError, match=r"codec: "):
                type(codec).load(path, SPEC)

    def test_a_file_that_is_missing_is_refused(self, codec: Codec, tmp_path: Path) -> None:
        with pytest.raises(CodecError, match="nowhere"):
            type(codec).load(tmp_path / "nowhere", SPEC)

    def test_a_folder_that_is_missing_is_refused(self, codec: Codec, tmp_path: Path) -> None:
        with pytest.raises(CodecError, match="nowhere"):
            codec.save(tmp_path / "nowhere" / "codec")
