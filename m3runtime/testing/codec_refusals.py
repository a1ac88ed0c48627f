"""The laws of a codec's files, and of bytes and memories that are not what they should be."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3runtime.codecs.base import Codec
from m3runtime.errors import BlockError, CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.testing.codec_laws import OTHER_SPECS, OUT, CodecLaws, identical, make_memories, noise


class RefusalLaws(CodecLaws):
    """Whatever it is given, a codec gives finite values or one of two errors."""

    # Bytes that nobody encoded

    # Each subclass runs it with a codec of its own, and finds its own examples.
    @settings(deadline=None, suppress_health_check=[HealthCheck.differing_executors])
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
        memories = self.memories([12, 5])
        getattr(memories, part)[1, 2, 1, 4, 15] = value
        with pytest.raises(CodecError, match="not finite"):
            codec.encode(memories)

    @pytest.mark.parametrize("spec", OTHER_SPECS[:1])
    def test_memories_of_another_shape_are_refused(self, codec: Codec, spec: MemorySpec) -> None:
        with pytest.raises(CodecError, match="do not fit"):
            codec.encode(make_memories([12], spec=spec))

    def test_an_untrained_codec_is_refused(self, tmp_path: Path) -> None:
        codec = self.make(self.spec)
        assert codec.trained is not self.trains
        if not self.trains:
            return
        with pytest.raises(CodecError):
            codec.encode(self.memories([12]))
        with pytest.raises(CodecError):
            codec.decode(noise(1, codec.payload_bytes(12), 0), torch.tensor([12]), torch.float32)
        with pytest.raises(CodecError):
            codec.save(tmp_path / "codec")
        with pytest.raises(CodecError):
            _ = codec.fingerprint

    # Files

    def test_a_saved_codec_is_the_same_codec(self, codec: Codec, tmp_path: Path) -> None:
        codec.save(tmp_path / "codec")
        loaded = type(codec).load(tmp_path / "codec", self.spec)
        memories = self.memories([12, 5])
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
                type(codec).load(path, self.spec)

    def test_a_file_of_another_length_is_refused(self, codec: Codec, tmp_path: Path) -> None:
        path = tmp_path / "codec"
        codec.save(path)
        good = path.read_bytes()
        for bad in (b"", good[:7], good[:100], good[:-1], good + b"\0", b"\xff" * 8 + good[8:]):
            path.write_bytes(bad)
            with pytest.raises(CodecError, match=r"codec: "):
                type(codec).load(path, self.spec)

    def test_a_file_that_is_missing_is_refused(self, codec: Codec, tmp_path: Path) -> None:
        with pytest.raises(CodecError, match="nowhere"):
            type(codec).load(tmp_path / "nowhere", self.spec)

    def test_a_folder_that_is_missing_is_refused(self, codec: Codec, tmp_path: Path) -> None:
        with pytest.raises(CodecError, match="nowhere"):
            codec.save(tmp_path / "nowhere" / "codec")
