"""Codecs turn memories into payloads of blocks and back."""

from m3runtime.codecs.base import Codec
from m3runtime.codecs.files import Distortion

__all__ = ["Codec", "Distortion"]
