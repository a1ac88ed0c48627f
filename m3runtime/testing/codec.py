"""`CodecContract`: the laws of a codec."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from m3runtime.codecs.base import Codec
from m3runtime.memory.tensors import MemoryTensors, kept
from m3runtime.testing.codec_laws import OTHER_SPECS, OUT, SPEC, UNEVEN, identical, make_memories, noise, rows
from m3runtime.testing.codec_refusals import RefusalLaws

__all__ = ["OTHER_SPECS", "OUT", "SPEC", "UNEVEN", "CodecContract", "identical", "make_memories", "noise", "rows"]


class CodecContract(RefusalLaws):
    """Subclass it as ``TestMyCodec``, make the codec, and say how much of a random memory it may lose.

    Its themes: bytes and values (here), and `RefusalLaws`.
    """

    # Bytes

    def test_encoding_is_deterministic(self, codec: Codec) -> None:
        payloads = codec.encode(self.memories([12, 5, 1]))
        assert payloads.dtype == torch.uint8
        assert payloads.shape == (3, codec.payload_bytes(self.spec.tokens))
        assert payloads.device.type == "cpu"
        assert torch.equal(payloads, codec.encode(self.memories([12, 5, 1])))

    def test_a_longer_memory_takes_no_fewer_bytes(self, codec: Codec) -> None:
        sizes = [codec.payload_bytes(tokens) for tokens in range(1, self.spec.tokens + 1)]
        assert sizes == sorted(sizes)
        assert sizes[0] > 0

    def test_a_payload_ends_where_it_says_and_zeros_follow(self, codec: Codec) -> None:
        tokens = [12, 5, 1]
        for payload, own in zip(codec.encode(self.memories(tokens)), tokens, strict=True):
            assert not payload[codec.payload_bytes(own) :].any()

    def test_the_bytes_of_its_own_length_are_enough(self, codec: Codec) -> None:
        memory = self.memories([5])
        payload = codec.encode(memory)
        short = codec.decode(payload[:, : codec.payload_bytes(5)], memory.tokens, torch.float32)
        assert identical(short, codec.decode(payload, memory.tokens, torch.float32))

    def test_no_memories_are_no_bytes(self, codec: Codec) -> None:
        empty = rows(self.memories([12]), slice(0, 0))
        payloads = codec.encode(empty)
        assert payloads.shape == (0, codec.payload_bytes(self.spec.tokens))
        assert len(codec.decode(payloads, empty.tokens, torch.float32)) == 0

    # A memory and its neighbours

    def test_encoding_does_not_depend_on_the_batch(self, codec: Codec) -> None:
        memories = self.memories([12, 3, 8, 12, 1, 11])
        together = codec.encode(memories)
        for i in range(len(memories)):
            assert torch.equal(codec.encode(rows(memories, slice(i, i + 1))), together[i : i + 1])

    def test_encoding_reads_no_token_that_does_not_exist(self, codec: Codec) -> None:
        long, short = self.memories([12, 4]), self.memories([12, 4])
        for x in (short.keys, short.values):
            x[1, :, :, 4:] = 1e4
        assert torch.equal(codec.encode(long), codec.encode(short))

    def test_encoding_does_not_depend_on_strides(self, codec: Codec) -> None:
        memories = self.memories([12, 4])
        keys, values = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (memories.keys, memories.values))
        assert torch.equal(codec.encode(MemoryTensors(keys, values, memories.tokens)), codec.encode(memories))

    def test_hundreds_in_a_batch_and_some_twice(self, codec: Codec) -> None:
        some = self.memories([12, 3, 8, 1])
        which = torch.arange(300) % 4
        many = MemoryTensors(some.keys[which], some.values[which], some.tokens[which])
        payloads, few = codec.encode(many), codec.encode(some)
        assert torch.equal(payloads, few[which])
        decoded, alone = (
            codec.decode(bytes_, memories.tokens, torch.float32) for bytes_, memories in ((payloads, many), (few, some))
        )
        assert torch.equal(decoded.keys, alone.keys[which])
        assert torch.equal(decoded.values, alone.values[which])

    def test_what_is_given_stays_as_it_is(self, codec: Codec) -> None:
        memories, same = self.memories([12, 4]), self.memories([12, 4])
        payloads = codec.encode(memories)
        kept = payloads.clone()
        codec.decode(payloads, memories.tokens, torch.float32).keys.zero_()
        assert torch.equal(payloads, kept)
        assert torch.equal(memories.tokens, same.tokens)
        for mine, made in ((memories.keys, same.keys), (memories.values, same.values)):
            torch.testing.assert_close(mine, made, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("dtype", OUT)
    def test_decoding_does_not_depend_on_the_batch(self, codec: Codec, dtype: torch.dtype) -> None:
        memories = self.memories([12, 3, 8, 12, 1, 11])
        payloads = codec.encode(memories)
        together = codec.decode(payloads, memories.tokens, dtype)
        for i, own in enumerate(memories.tokens.tolist()):
            alone = codec.decode(payloads[i : i + 1], memories.tokens[i : i + 1], dtype)
            assert alone.keys.shape[3] == own
            assert torch.equal(alone.keys[0], together.keys[i, :, :, :own])
            assert torch.equal(alone.values[0], together.values[i, :, :, :own])

    def test_what_follows_a_payload_in_its_slot_does_not_matter(self, codec: Codec) -> None:
        memories = self.memories([12, 3, 8])
        payloads = codec.encode(memories)
        slots = noise(3, 5 + payloads.shape[1] + 30, seed=0)  # neither aligned nor contiguous
        for slot, payload, own in zip(slots, payloads, memories.tokens.tolist(), strict=True):
            size = codec.payload_bytes(own)
            slot[5 : 5 + size] = payload[:size]
        decoded = codec.decode(slots[:, 5:], memories.tokens, torch.float32)
        assert identical(decoded, codec.decode(payloads, memories.tokens, torch.float32))

    def test_threads_share_a_codec(self, codec: Codec) -> None:
        batches = [self.memories([12, i + 1], seed=i) for i in range(8)]
        wanted = [codec.encode(batch) for batch in batches]
        decoded = [
            codec.decode(payloads, batch.tokens, torch.float32) for payloads, batch in zip(wanted, batches, strict=True)
        ]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                assert all(map(torch.equal, pool.map(codec.encode, batches), wanted))
                again = pool.map(lambda i: codec.decode(wanted[i], batches[i].tokens, torch.float32), range(8))
                assert all(map(identical, again, decoded))

    # Values

    @pytest.mark.parametrize("dtype", OUT)
    def test_decoded_memories_have_their_shape_and_dtype_and_zeros_beyond(
        self, codec: Codec, dtype: torch.dtype
    ) -> None:
        memories = self.memories([9, 3])
        decoded = codec.decode(codec.encode(memories), memories.tokens, dtype)
        assert decoded.keys.shape == decoded.values.shape == (2, 3, 2, 9, 16)
        assert decoded.keys.dtype == decoded.values.dtype == dtype
        assert torch.equal(decoded.tokens, memories.tokens)
        assert not decoded.keys[1, :, :, 3:].any()
        assert not decoded.values[1, :, :, 3:].any()

    def test_what_heads_do_not_keep_takes_no_bytes_and_is_zero(self, codec: Codec) -> None:
        memories = self.memories([12, 5, 1])
        decoded = codec.decode(codec.encode(memories), memories.tokens, torch.float32)
        lacking = ~kept(self.spec, 12)
        assert not decoded.keys[:, lacking].any()
        assert not decoded.values[:, lacking].any()
        if self.spec.budgets:  # a token that half of the heads keep takes less than one that all keep
            first, last = (codec.payload_bytes(n) - codec.payload_bytes(n - 1) for n in (2, 12))
            assert 0 < last < first

    def test_smaller_dtypes_are_the_same_values_rounded(self, codec: Codec) -> None:
        memories = self.memories([9, 3])
        payloads = codec.encode(memories)
        exact = codec.decode(payloads, memories.tokens, torch.float32)
        for dtype, tolerance in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)):
            rounded = codec.decode(payloads, memories.tokens, dtype)
            torch.testing.assert_close(rounded.keys.float(), exact.keys, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(rounded.values.float(), exact.values, rtol=tolerance, atol=tolerance)

    def test_distortion_is_within_its_bound(self, codec: Codec) -> None:
        measured = codec.distortion(self.memories([12, 5, 9, 12, 12, 1], seed=2))
        assert measured.keys <= self.worst.keys
        assert measured.values <= self.worst.values

    @pytest.mark.parametrize("dtype", OUT)
    def test_memories_of_any_dtype_are_encoded(self, codec: Codec, dtype: torch.dtype) -> None:
        memories = self.memories([9, 3])
        small = MemoryTensors(memories.keys.to(dtype), memories.values.to(dtype), memories.tokens)
        wide = MemoryTensors(small.keys.float(), small.values.float(), memories.tokens)
        assert torch.equal(codec.encode(small), codec.encode(wide))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_the_accelerator_decodes_to_the_same_values(self, codec: Codec) -> None:
        memories = self.memories([12, 5, 9])
        payloads = codec.encode(memories)
        here = codec.decode(payloads, memories.tokens, torch.float32)
        there = codec.decode(payloads.cuda(), memories.tokens, torch.float32)
        assert there.keys.is_cuda
        torch.testing.assert_close(there.keys.cpu(), here.keys, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(there.values.cpu(), here.values, rtol=1e-6, atol=1e-6)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_the_accelerator_encodes_as_well(self, codec: Codec) -> None:
        memories = self.memories([12, 5, 9], seed=2)
        there = codec.encode(MemoryTensors(memories.keys.cuda(), memories.values.cuda(), memories.tokens))
        assert there.device.type == "cpu"
        different = (there != codec.encode(memories)).float().mean()
        assert float(different) < 0.01  # between centroids as near as rounding, either may be chosen
