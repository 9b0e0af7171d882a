"""Whole answers of several backends, in turn, by the host's clock: `mpk-spec bench` without a GPU, and its page."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpk_spec.progress import Progress
    from mpk_spec.runtime.backend import Backend


@dataclass(frozen=True)
class Run:
    """One answer: seconds to the first token and seconds of the whole, for `tokens` tokens."""

    first_s: float
    total_s: float
    tokens: int

    @property
    def ms_per_token(self) -> float:
        """After the first token, which alone pays for the prompt."""
        return (self.total_s - self.first_s) / (self.tokens - 1) * 1e3


def take_turns(
    backends: dict[str, Backend], prompt_tokens: int, new_tokens: int, repeats: int, progress: Progress
) -> dict[str, list[Run]]:
    """`repeats` runs of each backend, in turns, so that a machine that slows down slows all; one more warms up."""
    runs: dict[str, list[Run]] = {name: [] for name in backends}
    total = (repeats + 1) * len(backends)
    for turn in range(repeats + 1):
        for number, (name, backend) in enumerate(backends.items()):
            progress("measuring", turn * len(backends) + number, total)
            run = once(backend, prompt_tokens, new_tokens)
            if turn > 0:
                runs[name].append(run)
    return runs


def once(backend: Backend, prompt_tokens: int, new_tokens: int) -> Run:
    """Answers a made-up prompt from an empty cache; no token stops it."""
    ids = [(17 + 31 * position) % backend.vocab_size for position in range(prompt_tokens)]
    backend.reset()
    started = time.perf_counter()
    first = 0.0
    count = 0
    for _ in backend.stream(ids, max_new_tokens=new_tokens):
        count += 1
        if count == 1:
            first = time.perf_counter() - started
    return Run(first, time.perf_counter() - started, count)


def summary(runs: list[Run]) -> dict:
    """Medians over the runs, and the fastest and slowest pace."""
    paces = [run.ms_per_token for run in runs]
    return {
        "ms_per_token": median(paces),
        "ms_per_token_min": min(paces),
        "ms_per_token_max": max(paces),
        "tokens_per_s": 1e3 / median(paces),
        "first_token_s": median(run.first_s for run in runs),
    }


def machine() -> dict:
    """What the numbers depend on."""
    import platform

    import torch
    import transformers

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def as_markdown(result: dict) -> str:
    """The result as a page: a title, a table with a row per backend, and what was measured where."""
    model, machine = result["model"], result["machine"]
    lines = [
        f"# {model['spec']} {model['size'] or ''}".rstrip(),
        "",
        "| backend | tok/s | ms/token (fastest to slowest) | first token, s |",
        "|---|---:|---:|---:|",
    ]
    for name, row in result["backends"].items():
        spread = f"{row['ms_per_token_min']:.1f} to {row['ms_per_token_max']:.1f}"
        cells = (
            name,
            f"{row['tokens_per_s']:.1f}",
            f"{row['ms_per_token']:.1f} ({spread})",
            f"{row['first_token_s']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    rows = list(result["backends"].items())
    if len(rows) == 2:
        (first, ours), (second, theirs) = rows
        lines += ["", f"{first} does {ours['tokens_per_s'] / theirs['tokens_per_s']:.2f} times the tokens of {second}."]
    lines += [
        "",
        f"Medians of {result['repeats']} answers of {result['new_tokens']} tokens to a prompt of "
        f"{result['prompt_tokens']}, batch 1, weights {model['weights']}.",
        f"{machine['processor']}, {machine['threads']} threads, Python {machine['python']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}.",
        "",
        *(f"- {name}: {row['description']}" for name, row in rows),
    ]
    return "\n".join(lines) + "\n"
