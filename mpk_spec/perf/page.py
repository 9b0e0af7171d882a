"""A benchmark's result as a page of Markdown."""

from __future__ import annotations

from typing import Any

TITLES = {
    "eager": "Hugging Face, eager",
    "compile": "Hugging Face, torch.compile with its CUDA graphs",
    "graph": "Hugging Face, torch.compile, one CUDA graph by hand",
}


def percent(result: dict[str, Any], ms: float) -> float:
    """Percent of the ceiling that the same run measured."""
    return 100 * floor_ms(result) / ms


def floor_ms(result: dict[str, Any]) -> float:
    """The time to read a token's bytes at the ceiling."""
    return result["bytes_per_token"]["total"] / result["ceiling"]["gbps"] / 1e6


def as_markdown(result: dict[str, Any]) -> str:
    model, gpu = result["model"], result["gpu"]
    gpus = gpu["name"] if result["tp"] == 1 else f"{result['tp']} x {gpu['name']}"
    lines = [
        f"# {model['spec']} {model['size']} on {gpus}, batch 1, context {result['context']}",
        "",
        "| | ms/token | of the ceiling | ours is faster by |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in _rows(result)),
        "",
        *_notes(result),
    ]
    return "\n".join(lines) + "\n"


def _rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    ours = result["ours"]
    spread = f"{ours['kernel_ms']:.3f} ({ours['kernel_ms_min']:.3f} to {ours['kernel_ms_max']:.3f})"
    rows = [
        ("the kernel, by the GPU's clock", spread, ours["kernel_ms"], ""),
        ("as a user sees it", f"{ours['user_ms']:.3f}", ours["user_ms"], ""),
        ("the simulation's prediction", f"{result['simulation']['ms']:.3f}", result["simulation"]["ms"], ""),
        ("the ceiling of memory", f"{floor_ms(result):.3f}", floor_ms(result), ""),
    ]
    for name, rival in result["rivals"].items():
        if "failed" in rival:
            continue
        times = f"{rival['ms'] / ours['user_ms']:.2f} times"
        rows.append((TITLES[name], f"{rival['ms']:.3f}", rival["ms"], times))
    return [(what, ms, f"{percent(result, value):.1f} %", times) for what, ms, value, times in rows]


def _notes(result: dict[str, Any]) -> list[str]:
    size, ceiling, ours, software = (result[k] for k in ("bytes_per_token", "ceiling", "ours", "software"))
    on_each = " on each GPU" if result["tp"] > 1 else ""
    notes = [
        f"A token reads{on_each} {size['total'] / 1e9:.3f} GB: {size['weights'] / 1e9:.3f} GB of weights and "
        f"{size['kv'] / 1e9:.3f} GB of keys and values. The ceiling is {ceiling['gbps']:.0f} GB/s, the best of two "
        f"sweeps in this run (chunks of {ceiling['chunk_kib']} KiB, {ceiling['in_flight_kib']} KiB in flight for each "
        f"SM), {100 * ceiling['gbps'] / ceiling['theoretical_gbps']:.1f} % of the data sheet's "
        f"{ceiling['theoretical_gbps']:.0f} GB/s.",
        f"Medians of {ours['repeats']} launches of {ours['tokens']} tokens in steady state; random keys and values; "
        f"the first token after a prompt of {ours['prompt_tokens']} takes {ours['first_token_s'] * 1e3:.1f} ms; "
        f"weights {result['model']['weights']}. Rivals are timed as a user sees them and compared with ours so timed.",
        _said(result.get("verdict")),
        *(f"{TITLES[n]} did not run: {r['failed']}" for n, r in result["rivals"].items() if "failed" in r),
        f"{ours['description']}; cache of {result['cache']} positions; CUDA {software['cuda']}, driver for CUDA "
        f"{result['gpu']['driver_cuda']}, Python {software['python']}, torch {software['torch']}, "
        f"transformers {software['transformers']}.",
    ]
    return "\n\n".join(notes).splitlines()


def _said(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return "Correctness: not judged in this run."
    kl = next(row for row in verdict["rows"] if row["name"] == "KL mean")
    ours = "not finite" if kl["ours"] is None else f"{kl['ours']:.3g}"
    return (
        f"Correctness: {'passed' if verdict['passed'] else 'FAILED'}. Over {verdict['positions']} positions, in "
        f"sequences of {verdict['sequence']}, the mean KL divergence from Hugging Face in float32 is {ours}, that of "
        f"Hugging Face in bf16 {kl['rival']:.3g}."
    )
