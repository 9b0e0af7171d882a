"""compute-sanitizer on the smallest run of the kernel that has everything in it: chunks of prompt and three tokens.

python benchmarks/sanitize.py                      # memcheck, racecheck, synccheck; a table of verdicts last
python benchmarks/sanitize.py memcheck --limit 300
python benchmarks/sanitize.py --without o_add      # a kernel with tasks that this one has not

The tools slow every access down a hundredfold, and a persistent kernel spins while it waits. So the plan is one for a
few SMs only, the cubin is built before, the watchdog has all the time there is, and only the kernel is instrumented.
Exit code 1 unless every tool finds nothing.

racecheck follows neither bulk copies that complete on an mbarrier, nor what one warp hands to another through one, and
knows no flags that one thread sets and others watch. Hazards between just those places (KNOWN) are counted apart; one
anywhere else is a finding. What they protect is proved otherwise: tests/gpu holds the kernel to the plan under delays.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

TOOLS = ("memcheck", "racecheck", "synccheck")
PROMPT, NEW, CONTEXT = 66, 3, 128  # more than a block of positions, so that attention takes two at once
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")
FOUND = 9  # the tools' exit code for a finding
HAZARD = re.compile(r"(Error|Warning): Race reported between \w+ access at (.*)")
OTHER = re.compile(r"and \w+ access at (.*)")
PLACE = re.compile(r"([^+<(]+)(?:.*? in ([\w.]+):\d+)?")
KERNEL = "megakernel"  # the place of what the compiler put straight into it
FLAGS = {"mpk::ptx::load_shared_flag", "mpk::ptx::store_shared_flag"}
KNOWN = (  # (who writes, who reads)
    # a chunk of the ring, full: mbarrier with bytes expected. A load that several tasks share has no line of its own
    (
        {"mpk::ptx::copy_to_shared"},
        {"mpk::ptx::load_matrices", "mpk::ptx::load_matrices_transposed", "mpk::Attention", KERNEL},
    ),
    # stop, abort, progress for the watchdog, descriptors for the loader: volatile, one writer
    (FLAGS, FLAGS),
    # a step, ready, or described for the loader: its descriptor
    (
        {"mpk::Scheduler::next_step", f"{KERNEL} in scheduler.cuh"},
        {"mpk::Worker::Worker", "mpk::EmbeddingRow", "mpk::TokenLoop::prepare", "mpk::ChunkCursor::learn",
         "mpk::ChunkCursor::of_pages"},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    tool: str
    says: str  # "clean", or why not
    seconds: float

    @property
    def clean(self) -> bool:
        return self.says.startswith("clean")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"default: {', '.join(TOOLS)}")
    parser.add_argument("--spec", default="qwen3")
    parser.add_argument(
        "--without", action="append", metavar="FUSION[=OPERATOR,...]", default=[], help="as kernel.py's"
    )
    parser.add_argument("--target", default="h100")
    parser.add_argument("--sms", type=int, default=4)
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for each tool")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run(options)
    program = find_sanitizer()
    build(options)
    expected = Checked("no tool", [], options)
    print(expected.output, flush=True)
    verdicts = [expected.verdict(expected.tokens)]
    for tool in options.tools or TOOLS:
        command = [program, "--tool", tool, "--kernel-name", "kns=megakernel", "--error-exitcode", str(FOUND)]
        # what the libraries ask the driver for in vain (a symbol of another version) is no error of the kernel
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        checked = Checked(tool, command, options)
        print(f"--- {tool}\n{shortened(checked.output)}", flush=True)
        verdicts.append(checked.verdict(expected.tokens))
    print(f"{'tool':<12}{'seconds':>8}  verdict")
    for verdict in verdicts:
        print(f"{verdict.tool:<12}{verdict.seconds:>8.1f}  {verdict.says}")
    return 0 if all(v.clean for v in verdicts) else 1


def find_sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        sys.exit("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    return found


def shortened(text: str, lines: int = 40) -> str:
    kept = text.splitlines()
    return "\n".join(kept if len(kept) <= 2 * lines else [*kept[:lines], "...", *kept[-lines:]])


def known_hazards(text: str) -> int:
    """How many of racecheck's hazards lie between a writer and readers of one of KNOWN alone."""
    places: list[set[str]] = []
    for line in text.splitlines():
        if hazard := HAZARD.search(line):
            places.append({place_of(hazard[2])})
        elif places and (other := OTHER.search(line)):
            places[-1].add(place_of(other[1]))
    return sum(any(found <= w | r and found & w for w, r in KNOWN) for found in places)


def place_of(text: str) -> str:
    """A function's name; of what lies in the kernel itself also the file, if it has one."""
    function, file = PLACE.match(text).groups()
    return f"{function} in {file}" if function == KERNEL and file else function


class Checked:
    """One run of this program under a tool; ended after the limit."""

    def __init__(self, tool: str, command: list[str], options):
        self.tool, self.limit = tool, options.limit
        same = ["--spec", options.spec, "--target", options.target, "--sms", str(options.sms)]
        same += [f"--without={word}" for word in options.without]
        arguments = [*command, sys.executable, __file__, "--child", "--limit", str(options.limit), *same]
        # one allocation per tensor: inside torch's own blocks no access would be out of bounds
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
        started = time.perf_counter()
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.output, _ = process.communicate(timeout=options.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool's child holds the GPU
            self.output, _ = process.communicate()
        self.code, self.seconds = process.returncode, time.perf_counter() - started
        made = re.search(r"^tokens: (.*)$", self.output, re.MULTILINE)
        self.tokens = made[1] if made else None

    def verdict(self, expected: str | None) -> Verdict:
        found = SUMMARY.findall(self.output)
        if self.code == -signal.SIGKILL:
            says = f"not done in {self.limit:.0f} s"
        elif self.tool != "no tool" and not found:
            says = f"no summary, exit code {self.code}"
        elif self.tool == "racecheck" and found and (known := known_hazards(self.output)) == int(found[0][1]) > 0:
            says = f"clean but for {known} that it cannot judge" if self.tokens == expected else "other tokens"
        elif any(int(count) for _, count in found):
            says = ", ".join(f"{count} {'hazards' if kind == 'RACECHECK' else 'errors'}" for kind, count in found)
        elif self.code != 0:
            says = f"exit code {self.code}"
        elif self.tokens is None or self.tokens != expected:
            says = f"other tokens: {self.tokens}, not {expected}"
        else:
            says = "clean"
        return Verdict(self.tool, says, self.seconds)


def plan_small(options):
    from random_kernel import unfused

    from mpk_spec.planner import plan
    from mpk_spec.schema import load_spec

    spec = unfused(load_spec(options.spec), options.without)
    return plan(spec, size="tiny", target=f"{options.target}:{options.sms}", context=CONTEXT)


def build(options) -> None:
    """Puts the cubin into the cache."""
    from mpk_spec.emit.compiler import compile_kernel
    from mpk_spec.emit.source import emit
    from mpk_spec.planner.targets import find_target

    made = plan_small(options)
    compile_kernel(made.name, emit(made).source, find_target(made.target).arch)


def run(options) -> int:
    """What is looked at."""
    from mpk_spec.runtime.cuda_backend import CudaBackend
    from mpk_spec.runtime.random_model import checkpoint_of_plan

    made = plan_small(options)
    backend = CudaBackend(made, checkpoint_of_plan(made, 0), whole_gpu=False)
    backend.launcher.timeout_s = options.limit
    prompt = [(17 + 31 * n) % backend.vocab_size for n in range(PROMPT)]
    print("tokens:", *backend.stream(prompt, max_new_tokens=NEW), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
