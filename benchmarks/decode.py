"""Every figure of the README's performance section, measured on this machine's GPU, or GPUs: a table and a plot.

python benchmarks/decode.py                       # all; again after a break: only what is missing
python benchmarks/decode.py qwen3:8b:4096         # one model at one context; --again measures it anew
python benchmarks/decode.py qwen3:8b:128:tp2      # on two GPUs
python benchmarks/decode.py --table               # only writes table and plot of what was measured

Each model is one `mpk-spec bench` in a process of its own, with a limit of its own, so that one that hangs costs no
other. Results lie in benchmarks/decode/, one folder for each kind of GPU. The plot needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
RIVALS = ("eager", "compile")


@dataclass(frozen=True)
class Job:
    """One line of the table. rivals: measured beside it, which takes a minute more and twice the model's memory."""

    spec: str
    size: str
    context: int = 128
    rivals: tuple[str, ...] = ()
    tp: int = 1

    @property
    def name(self) -> str:
        return f"{self.spec}:{self.size}:{self.context}" + (f":tp{self.tp}" if self.tp > 1 else "")

    def command(self, folder: Path, tokens: int) -> list[str]:
        wanted = [word for rival in self.rivals for word in ("--rival", rival)]
        wanted += ["--tp", str(self.tp)] if self.tp > 1 else []
        return [
            sys.executable, "-m", "mpk_spec", "bench", self.spec, "--size", self.size, "--weights", "random:0",
            "--backend", "cuda", "-c", str(self.context), "-n", str(tokens), *wanted, "-o", str(folder),
        ]  # fmt: skip

    def result(self, folder: Path, target: str) -> Path:
        degree = f"-tp{self.tp}" if self.tp > 1 else ""
        return folder / f"{self.spec}-{self.size}-{target}{degree}-context{self.context}.json"


JOBS = (
    Job("smollm2", "135m", rivals=RIVALS),
    Job("qwen3", "0.6b", rivals=RIVALS),
    Job("llama3", "1b", rivals=RIVALS),
    Job("qwen3", "1.7b", rivals=RIVALS),
    Job("qwen3", "8b", rivals=RIVALS),
    Job("qwen3", "8b", 4096),
    Job("qwen3", "8b", 32768),
    Job("qwen3", "32b"),
    Job("qwen3", "8b", tp=2),
    Job("qwen3", "32b", tp=2),
)
NAME = re.compile(r"(?P<spec>[^:]+):(?P<size>[^:]+?)(:(?P<context>\d+))?(:tp(?P<tp>\d+))?")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="SPEC:SIZE[:CONTEXT][:tpN]", help="default: all of the table")
    parser.add_argument("--target", help="h100, h200, ...; default: what this machine has")
    parser.add_argument("--each", type=float, default=300, metavar="S", help="seconds that one model may take")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds after which no other model is begun")
    parser.add_argument("--tokens", type=int, default=64, help="of a timed launch")
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure also what was measured before")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "decode", metavar="FOLDER")
    options = parser.parse_args()
    target = options.target or target_here()
    folder = options.output / target
    jobs = chosen(options.jobs, options.no_rivals)
    failed = [] if options.table else run_all(jobs, folder, target, options)
    write_table(folder, jobs if options.jobs else list(JOBS), target)
    return 1 if failed else 0


def target_here() -> str:
    from mpk_spec.errors import UserError
    from mpk_spec.runtime.cuda_device import gpu_alone
    from mpk_spec.runtime.select import target_here as found

    try:
        with gpu_alone():
            return found()[0].name
    except UserError as error:
        sys.exit(f"error: {error}")


def chosen(names: list[str], no_rivals: bool) -> list[Job]:
    """The jobs of these names; one that the table lacks is measured without rivals."""
    known = {job.name: job for job in JOBS}
    jobs = []
    for name in names or known:
        found = NAME.fullmatch(name)
        if not found:
            sys.exit(f"error: '{name}' is no SPEC:SIZE[:CONTEXT][:tpN]")
        job = Job(found["spec"], found["size"], int(found["context"] or 128), tp=int(found["tp"] or 1))
        job = known.get(job.name, job)
        jobs.append(replace(job, rivals=()) if no_rivals else job)
    return jobs


def gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def run_all(jobs: list[Job], folder: Path, target: str, options) -> list[Job]:
    """Measures what is missing; returns the jobs that failed. What is left at the limit is said, not failed."""
    started, failed, left, gpus = time.monotonic(), [], [], gpus_here()
    for job in jobs:
        if job.result(folder, target).is_file() and not options.again:
            wrong = is_wrong(job.result(folder, target))
            print(f"{job.name}: measured before{', and its numbers are wrong' if wrong else ''}", flush=True)
            failed += [job] if wrong else []
            continue
        if job.tp > max(gpus, 1):
            print(f"{job.name}: left out, it needs {job.tp} GPUs and this machine has {gpus}", flush=True)
            continue
        remaining = options.each
        if options.limit is not None:
            remaining = min(remaining, options.limit - (time.monotonic() - started))
        if remaining < min(options.each, 30):
            left.append(job.name)
            continue
        if not run(job, folder, options.tokens, remaining):
            failed.append(job)
    if left:
        print(f"not begun, the time is up: {', '.join(left)}; run this again")
    return failed


def is_wrong(result: Path) -> bool:
    """Whether the verdict of a benchmark was a failure: its speed says nothing, then and later."""
    return not (json.loads(result.read_text()).get("verdict") or {"passed": True})["passed"]


def run(job: Job, folder: Path, tokens: int, limit: float) -> bool:
    """One benchmark. Its table goes to its file, what went wrong to standard output."""
    began = time.monotonic()
    try:
        done = subprocess.run(job.command(folder, tokens), capture_output=True, text=True, timeout=limit, check=False)
        said = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-600:]}"
    except subprocess.TimeoutExpired:
        said = f"took more than {limit:.0f} s and was ended"
    print(f"{job.name}: {said or 'measured'} ({time.monotonic() - began:.0f} s)", flush=True)
    return not said


def write_table(folder: Path, jobs: list[Job], target: str) -> None:
    """table.md, table.json and decode.png of the results there are; the table also to standard output."""
    from mpk_spec.files import write_aside

    results = [json.loads(p.read_text()) for job in jobs if (p := job.result(folder, target)).is_file()]
    if not results:
        print("nothing is measured yet")
        return
    rows = [row_of(result) for result in results]
    text = table(rows, results)
    write_aside(folder / "table.md", text)
    write_aside(folder / "table.json", json.dumps(rows, indent=2) + "\n")
    print(text, end="")
    if plot(rows, folder / "decode.png"):
        print(f"plot: {folder / 'decode.png'}")
    else:
        print("no plot: matplotlib is not installed (pip install 'mpk-spec[plot]')", file=sys.stderr)


def row_of(result: dict) -> dict:
    from mpk_spec.perf.page import floor_ms, percent

    ours, verdict = result["ours"], result.get("verdict")
    rivals = {name: rival for name, rival in result["rivals"].items() if "ms" in rival}
    return {
        "model": f"{result['model']['spec']} {result['model']['size']}" + on_gpus(result), "context": result["context"],
        "gigabytes": result["bytes_per_token"]["total"] / 1e9, "ceiling_gbps": result["ceiling"]["gbps"],
        "floor_ms": floor_ms(result), "kernel_ms": ours["kernel_ms"], "percent": percent(result, ours["kernel_ms"]),
        "user_ms": ours["user_ms"], "simulated_ms": result["simulation"]["ms"],
        "rivals_ms": {name: rival["ms"] for name, rival in rivals.items()},
        "rivals_percent": {name: percent(result, rival["ms"]) for name, rival in rivals.items()},
        "passed": None if verdict is None else verdict["passed"],
    }  # fmt: skip


def on_gpus(result: dict) -> str:
    """Of several GPUs bytes and ceiling are those of each. The first results on H100s do not say how many."""
    tp = result.get("tp", 1)
    return f", {tp} GPUs" if tp > 1 else ""


def table(rows: list[dict], results: list[dict]) -> str:
    names = [name for name in ("eager", "compile", "graph") if any(name in row["rivals_ms"] for row in rows)]
    titles = {"eager": "Hugging Face eager", "compile": "torch.compile + CUDA graphs", "graph": "compiled, one graph"}
    head = ["model", "context", "GB/token", "ceiling, GB/s", "ms/token", "of the ceiling", "a user sees", "simulated"]
    head += [f"{titles[name]} (ours faster by)" for name in names] + ["correct"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for row in rows:
        cells = [
            row["model"], str(row["context"]), f"{row['gigabytes']:.3f}", f"{row['ceiling_gbps']:.0f}",
            f"{row['kernel_ms']:.3f}", f"{row['percent']:.1f} %", f"{row['user_ms']:.3f}", f"{row['simulated_ms']:.3f}",
        ]  # fmt: skip
        for name in names:
            ms = row["rivals_ms"].get(name)
            cells.append("" if ms is None else f"{ms:.2f} ({ms / row['user_ms']:.2f}x)")
        cells.append({True: "passed", False: "FAILED", None: "not judged"}[row["passed"]])
        lines.append(f"| {' | '.join(cells)} |")
    gpus = sorted({result["gpu"]["name"] for result in results})
    note = (
        f"{', '.join(gpus)}; batch 1, bf16, greedy, random weights, cache filled at random; milliseconds per token in "
        "steady state, the kernel's by the GPU's clock, the rivals' as a user sees them. Each line's ceiling was "
        "measured in the same run. `python benchmarks/decode.py` measures all of it again."
    )
    return "\n".join([*lines, "", note]) + "\n"


def plot(rows: list[dict], path: Path) -> bool:
    """Percent of the ceiling, ours and the rivals', as bars. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    series = {"mpk-spec": [row["percent"] for row in rows]}
    for name, title in (("compile", "torch.compile + CUDA graphs"), ("eager", "Hugging Face eager")):
        if any(name in row["rivals_percent"] for row in rows):
            series[title] = [row["rivals_percent"].get(name, 0.0) for row in rows]
    figure = Figure(figsize=(1.8 + 1.1 * len(rows), 4), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(series)
    for number, (title, values) in enumerate(series.items()):
        places = [n + (number - (len(series) - 1) / 2) * width for n in range(len(rows))]
        bars = axes.bar(places, values, width, label=title)
        axes.bar_label(bars, [f"{v:.0f}" if v else "" for v in values], fontsize=8)
    axes.set_xticks(range(len(rows)), [f"{row['model']}\ncontext {row['context']}" for row in rows], fontsize=8)
    axes.set_ylabel("percent of the memory ceiling")
    axes.set_ylim(0, 105)
    axes.axhline(100, color="grey", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=len(series), fontsize=8)
    figure.savefig(path, dpi=150)
    return True


if __name__ == "__main__":
    sys.exit(main())
