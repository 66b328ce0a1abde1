"""The decoder, and model families as specs."""

from taper.models.decoder import Decoder

__all__ = ["Decoder"]
