"""A tokenizer for models that have none: random weights. Bytes in; ids past the bytes show as their numbers."""

from __future__ import annotations

from collections.abc import Sequence


class RawTokens:
    """The first 256 ids are bytes. Has what a chat asks of a tokenizer, and no chat template."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Sequence[int], **options: bool) -> str:
        return b"".join(bytes([i]) if i < 256 else f"<{i}>".encode() for i in ids).decode(errors="replace")
