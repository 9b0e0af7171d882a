"""From a stream of token ids to a stream of text that a terminal can show at once."""

from __future__ import annotations

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


class Detokenizer:
    """Turns ids into pieces of text whose concatenation is the decoding of all ids together.

    A token may hold a part of a UTF-8 character and a decoder may drop or keep a space depending on the token before.
    So the text of a window is decoded with and without the new ids, and the difference is emitted once it ends in a
    whole character. The window starts at the previous piece, so the cost per token is constant.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0  # how many ids of the window have been turned into text

    def push(self, token: int) -> str:
        """The text that `token` completes, "" where it completes none."""
        self._window.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """The text of ids that never became whole characters; bytes that are no character show as U+FFFD."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._window[: self._emitted])
        now = self._decode(self._window)
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class ThinkSplitter:
    """Splits streamed text into thought and answer at `<think>` and `</think>`, which may arrive in several pieces."""

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, thinking: bool = False):
        """`thinking`: whether the prompt itself has opened the thought, as some templates do."""
        self.thinking = thinking
        self._held = ""

    def push(self, text: str) -> list[tuple[str, bool]]:
        """Pieces of `(text, is_thought)` that are certain by now."""
        self._held += text
        pieces = []
        while True:
            tag = self.CLOSE if self.thinking else self.OPEN
            head, found, rest = self._held.partition(tag)
            if not found:
                break
            pieces.append((head, self.thinking))
            self.thinking, self._held = not self.thinking, rest
        keep = _partial_tag(self._held, tag)
        pieces.append((self._held[: len(self._held) - keep], self.thinking))
        self._held = self._held[len(self._held) - keep :]
        return [piece for piece in pieces if piece[0]]

    def flush(self) -> list[tuple[str, bool]]:
        held, self._held = self._held, ""
        return [(held, self.thinking)] if held else []


def _partial_tag(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
