"""A backend that takes a known time."""

from __future__ import annotations

import time


class Steady:
    """Gives a token every `step` seconds."""

    vocab_size = 50

    def __init__(self, step: float):
        self.step, self.prompts, self.description = step, [], f"steady, {step} s"

    def reset(self) -> None:
        self.prompts.append(None)

    def stream(self, ids, *, max_new_tokens):
        self.prompts[-1] = list(ids)
        for _ in range(max_new_tokens):
            time.sleep(self.step)
            yield 1

    def close(self) -> None:
        self.prompts.append("closed")
