"""Text to tokens and back: encoding, chat templates, incremental decoding."""

from taper.tokenizer.chat_template import ChatTemplate, Message
from taper.tokenizer.detokenizer import IncrementalDetokenizer
from taper.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "Message", "Tokenizer"]
