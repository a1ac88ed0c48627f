"""Codecs turn memories into payloads of blocks and back."""

from m3runtime.codecs.base import Codec, Distortion

__all__ = ["Codec", "Distortion"]
