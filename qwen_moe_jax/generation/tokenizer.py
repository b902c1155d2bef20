"""The checkpoint's own tokenizer."""

import bisect
import functools
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.json_files import read_json_object


def byte_characters() -> dict[int, str]:
    """What byte-level vocabularies write for each byte (Radford et al. 2019): those that print stand for
    themselves, and all others from U+0100 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """Text to token ids and back, by the checkpoint's `tokenizer.json`."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_id: int | None = None):
        self.backend = backend
        self.eos_token_id = eos_token_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer | None":
        """Reads the folder's tokenizer, or gives None when it has none.

        Raises:
            CheckpointError: tokenizer.json or tokenizer_config.json is damaged.
        """
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust binding raises plain Exception
            raise CheckpointError(f"{file} is not a tokenizer ({error}).") from None
        # Padding and truncation belong to whoever saved the file; here every prompt counts in full.
        backend.no_padding()
        backend.no_truncation()
        token = read_tokenizer_config(folder).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        return cls(backend, backend.token_to_id(token) if isinstance(token, str) else None)

    @property
    def vocab_size(self) -> int:
        """Ids known to the tokenizer; a model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size()

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, in UTF-8; nothing for ids without text."""
        of_character = {character: byte for byte, character in byte_characters().items()}
        byte_level = isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel)
        added = self.backend.get_added_tokens_decoder()
        found = []
        for token in range(self.vocab_size):
            text = self.backend.id_to_token(token)
            if token in added:
                found.append(b"" if added[token].special else added[token].content.encode())
            elif byte_level and text is not None and all(c in of_character for c in text):
                found.append(bytes(of_character[c] for c in text))
            else:
                found.append(self.decode([token]).encode())
        return found

    @functools.cached_property
    def _sorted_bytes(self) -> list[tuple[bytes, int]]:
        return sorted((text, token) for token, text in enumerate(self.token_bytes) if text)

    def tokens_beginning(self, beginning: bytes) -> list[int]:
        """Ids whose text begins with some bytes, at least one."""
        ordered = self._sorted_bytes
        first = bisect.bisect_left(ordered, (beginning, -1))
        last = bisect.bisect_left(ordered, (beginning + b"\xff" * 256, -1))
        return [token for _, token in ordered[first:last]]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Nothing is added; special tokens written in it are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def read_tokenizer_config(folder: str | Path) -> dict:
    """The folder's tokenizer_config.json, or an empty dict when it has none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    file = Path(folder) / "tokenizer_config.json"
    return read_json_object(file, CheckpointError) if file.is_file() else {}
