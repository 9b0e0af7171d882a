"""The kernel on a GPU: its module, the memory it works in, and one launch of it.

The structures below mirror cuda_templates/runtime/program.cuh; the kernel exports their sizes and a launch refuses
to run if the two sides disagree.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mpk_spec.emit.source import EVENT_STRIDE, Emitted
from mpk_spec.errors import UserError
from mpk_spec.runtime.cuda_probe import PROBES, Probe

if TYPE_CHECKING:
    from mpk_spec.planner.plan import Plan
    from mpk_spec.runtime.symmetric import Symmetric

MAX_TOKENS, MAX_STOP_IDS, STEP_SLOTS = 16, 16, 4
STEP = np.dtype(
    [("tokens", "<u4"), ("position", "<u4"), ("emitted", "<u4"), ("spare", "<u4"), ("ids", "<i4", MAX_TOKENS)]
)
STEP_WORDS = STEP.itemsize // 4
DESCRIBED = np.dtype([("word", "<u4"), ("number", "<u4")])  # the number of its step, from 1
CONTROL = np.dtype(
    [
        ("published", "<u4"), ("pad0", "<u4", 31), ("abort", "<u4"), ("pad1", "<u4", 31),
        ("steps", DESCRIBED, (STEP_SLOTS, STEP_WORDS)),
    ]
)  # fmt: skip
REPORT_FIELDS = ("set", "given", "taken", "step", "stage", "group", "task", "event", "seen", "wanted")
REPORT = np.dtype([(name, "<u4") for name in REPORT_FIELDS])
POINTERS = (
    "weights", "arena", "cache", "pages", "rope", "program", "events", "control", "reports", "prompt", "host",
)  # fmt: skip
NUMBERS = (
    "first_step", "prompt_end", "max_new", "context", "chunk", "num_stop_ids", "num_pages", "spare",
)  # fmt: skip


def params_dtype(ranks: int, probed: bool = False) -> np.dtype:
    """`Params`: what only several ranks have comes first, what only probing builds have last."""
    peers = [("inbox", "<u8"), ("distance", "<u8", ranks), ("rank", "<u4"), ("no_rank", "<u4")] if ranks > 1 else []
    return np.dtype(
        peers
        + [(n, "<u8") for n in (*POINTERS, "timeout_ns")]
        + [(n, "<u4") for n in NUMBERS]
        + [("stop_ids", "<i4", MAX_STOP_IDS)]
        + ([("probes", PROBES)] if probed else [])
    )


PARAMS, PROBED_PARAMS = params_dtype(1), params_dtype(1, probed=True)
SIZES = ("shared_bytes", "block_threads", "params", "control", "report", "step")
HOST_WORDS = 32  # before the ring's tokens: count, stop, abort, padding
TIMEOUT_S = 10.0
NO_MORE = 0xFFFF  # instead of a task in a report: the SM is to claim one from the pool, or knows that there is none


def check(result: tuple) -> Any:
    """The values of a driver call; UserError with the driver's own words, and what to do, where it failed."""
    from cuda.bindings import driver

    from mpk_spec.runtime.cuda_device import HINTS

    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(error)
        hint = HINTS.get(error.name.removeprefix("CUDA_ERROR_"))
        raise UserError(f"the CUDA driver says: {text.decode() if text else error.name}", hint)
    return values[0] if len(values) == 1 else tuple(values) or None


class KernelModule:
    """A loaded cubin. Checks that this machine is the one that the plan was made for.

    whole_gpu: refuse plans for fewer SMs than the GPU has, as those that tests make for a tool that slows all down.
    """

    def __init__(self, emitted: Emitted, cubin: bytes, device: int = 0, whole_gpu: bool = True):
        from cuda.bindings import driver

        check(driver.cuInit(0))
        self.device = check(driver.cuDeviceGet(device))
        _check_device(emitted, self.device, whole_gpu)
        self.module = check(driver.cuModuleLoadData(cubin))
        self.function = check(driver.cuModuleGetFunction(self.module, b"megakernel"))
        self.num_sms, self.ranks = emitted.plan.num_sms, emitted.plan.tp
        self.sizes = self._sizes()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self.function, attribute, self.sizes["shared_bytes"]))

    def _sizes(self) -> dict[str, int]:
        from cuda.bindings import driver

        address, size = check(driver.cuModuleGetGlobal(self.module, b"megakernel_sizes"))
        words = np.zeros(size // 4, np.uint32)
        check(driver.cuMemcpyDtoH(words.ctypes.data, address, size))
        sizes = dict(zip(SIZES, words.tolist(), strict=True))
        self.probed = sizes["params"] == params_dtype(self.ranks, probed=True).itemsize
        self.params = params_dtype(self.ranks, self.probed)
        ours = {"params": self.params, "control": CONTROL, "report": REPORT, "step": STEP}
        for name, dtype in ours.items():
            if sizes[name] != dtype.itemsize:
                raise UserError(
                    f"the kernel's '{name}' has {sizes[name]} bytes, the host's {dtype.itemsize}",
                    "kernel and mpk-spec are of different versions: build it again",
                )
        return sizes

    def write(self, symbol: str, words: tuple[int, ...]) -> None:
        """Sets a variable of the module, u32 `[len(words)]`, when no launch runs."""
        from cuda.bindings import driver

        address, size = check(driver.cuModuleGetGlobal(self.module, symbol.encode()))
        values = np.array(words, np.uint32)
        if size != values.nbytes:
            raise RuntimeError(f"'{symbol}' has {size} bytes, {values.nbytes} were given")
        check(driver.cuMemcpyHtoD(address, values.ctypes.data, values.nbytes))

    cooperative = True  # every SM gets its block or none does

    def launch(self, params: np.ndarray, stream: int) -> None:
        """Starts the kernel and returns."""
        from cuda.bindings import driver

        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self.num_sms, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.sizes["block_threads"], 1, 1
        config.sharedMemBytes, config.hStream = self.sizes["shared_bytes"], stream
        if self.cooperative:
            config.attrs, config.numAttrs = [attribute], 1
        pointers = (ctypes.c_void_p * 1)(params.ctypes.data)
        check(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


def _check_device(emitted: Emitted, device, whole_gpu: bool) -> None:
    from cuda.bindings import driver

    from mpk_spec.planner.targets import find_target

    kind = driver.CUdevice_attribute
    target = find_target(emitted.plan.target)
    major = check(driver.cuDeviceGetAttribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    minor = check(driver.cuDeviceGetAttribute(kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    sms = check(driver.cuDeviceGetAttribute(kind.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device))
    if f"sm_{major}{minor}" != target.arch.rstrip("a"):
        raise UserError(
            f"the plan is for {target.title} ({target.arch}), this GPU is sm_{major}{minor}",
            "build it for this GPU: mpk-spec build SPEC --target NAME",
        )
    if sms < emitted.plan.num_sms or (whole_gpu and sms != emitted.plan.num_sms):
        raise UserError(
            f"the plan is for {emitted.plan.num_sms} SMs, this GPU has {sms}", "one block per SM: plan for this GPU"
        )


class Memory:
    """What the kernel works in beside weights: events, programs, activations, cache, the host's ring.

    symmetric: with several ranks, what their peers write into.
    """

    def __init__(self, emitted: Emitted, device, symmetric: Symmetric | None = None):
        import torch

        from mpk_spec.runtime.cuda_weights import rope_tables

        plan, layout = emitted.plan, emitted.layout
        state = next(iter(plan.states.values()))
        self.num_pages = -(-state.context // state.page)

        def room(size: int) -> torch.Tensor:
            return torch.empty(max(size, 256), dtype=torch.uint8, device=device)

        self.arena = room(plan.arena_bytes.get("cuda", 0)).fill_(0xFF)  # NaN: what nobody wrote shows
        self.turning = self.arena[slice(*turning(plan))]
        self.cache = room(layout.cache_bytes).fill_(0xFF)
        self.pages = torch.arange(self.num_pages, dtype=torch.int32, device=device)
        self.rope = rope_tables(plan, layout).to(device)
        blob = np.frombuffer(emitted.programs.blob, np.uint8).copy()
        self.program = torch.from_numpy(blob).to(device)
        self.symmetric, sizes = symmetric, symmetric_sizes(emitted)
        shared = symmetric or {name: room(sizes[name])[: sizes[name]] for name in ("events", "control")}
        self.events = shared["events"].zero_().view(torch.int32)
        self.claims = self.events[emitted.num_events * EVENT_STRIDE :]  # the pools' counters
        self.control = shared["control"].zero_()
        if symmetric is not None:
            symmetric["inbox"].fill_(0xFF)
        self.reports = torch.zeros(plan.num_sms * REPORT.itemsize, dtype=torch.uint8, device=device)
        self.prompt = torch.zeros(plan.context, dtype=torch.int32, device=device)
        self.host = torch.zeros(HOST_WORDS + plan.context + 1, dtype=torch.int32).pin_memory()
        self.ring = self.host.numpy()

    def addresses(self) -> dict[str, int]:
        names = ("arena", "cache", "pages", "rope", "program", "events", "control", "reports", "prompt", "host")
        found = {name: getattr(self, name).data_ptr() for name in names}
        if self.symmetric is not None:
            found["inbox"] = self.symmetric["inbox"].data_ptr()
        return found


def turning(plan: Plan) -> tuple[int, int]:
    """Where in the arena the tensors lie that cross as data: [begin, end), empty where there are none."""
    found = [t for t in plan.tensors.values() if t.turns > 1 and t.placement == "cuda"]
    return min((t.offset for t in found), default=0), max((t.offset + t.bytes for t in found), default=0)


def symmetric_sizes(emitted: Emitted) -> dict[str, int]:
    """Bytes of what peers write into."""
    counters = emitted.num_counters * EVENT_STRIDE * 4
    return {"events": counters, "control": CONTROL.itemsize, "inbox": emitted.plan.arena_bytes.get("nvshmem", 0)}


class Launcher:
    """Starts the kernel for a stretch of tokens and watches its ring. Steps count from when events were last zero."""

    def __init__(self, emitted: Emitted, module: KernelModule, memory: Memory, weights):
        import torch

        self.emitted, self.module, self.memory, self.weights = emitted, module, memory, weights
        self.stream = torch.cuda.Stream()
        self.steps = 0
        self.timeout_s = TIMEOUT_S
        self.probe: Probe | None = None  # for builds that have probes
        self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.while_waiting: Callable[[], None] | None = None  # may raise, to give a launch up
        torch.cuda.synchronize()  # all that was prepared on other streams is there

    def start(self, prompt: list[int], position: int, max_new: int, stop: frozenset[int] = frozenset()) -> None:
        """Launches: `prompt` from `position` on, then up to `max_new` tokens."""
        import torch

        chunk = max(s.tokens for s in self.emitted.plan.steps.values())
        first = np.zeros((), STEP)
        count = min(chunk, len(prompt))
        first["tokens"], first["position"] = count, position
        first["ids"][:count] = prompt[:count]
        control = control_of(first, self.steps)
        self.memory.ring[:HOST_WORDS] = 0
        with torch.cuda.stream(self.stream):
            ids = torch.tensor(prompt, dtype=torch.int32)
            self.memory.prompt[position : position + len(prompt)].copy_(ids)
            self.memory.control.copy_(torch.frombuffer(bytearray(control.tobytes()), dtype=torch.uint8))
        self._clear_for_launch()
        params = self._params(position + len(prompt), max_new, stop, chunk)
        self.began.record(self.stream)
        self.module.launch(params, self.stream.cuda_stream)
        self.ended.record(self.stream)

    def _clear_for_launch(self) -> None:
        """What crosses as data, as the kernel leaves all of it but what its last step wrote; and what SMs had claimed.

        Attention's parts need it: those that a shorter context has no use for keep what a longer one left. Inboxes do
        not, and peers may write into them already.
        """
        self._clear(self.memory.turning, 0xFF)
        self._clear(self.memory.claims, 0)

    def _clear(self, memory, byte: int) -> None:
        """Sets all bytes of some memory."""
        from cuda.bindings import driver

        if memory.numel():
            check(driver.cuMemsetD8Async(memory.data_ptr(), byte, memory.nbytes, self.stream.cuda_stream))

    def _params(self, prompt_end: int, max_new: int, stop: frozenset[int], chunk: int) -> np.ndarray:
        params = np.zeros((), self.module.params)
        if self.probe is not None:
            params["probes"] = self.probe.record()
        for name, address in self.memory.addresses().items():
            params[name] = address
        if self.memory.symmetric is not None:
            params["rank"] = self.memory.symmetric.rank
            params["distance"] = [d % 2**64 for d in self.memory.symmetric.distances]
        params["weights"] = self.weights.data_ptr()
        params["timeout_ns"] = int(self.timeout_s * 1e9)
        params["first_step"], params["prompt_end"], params["max_new"] = self.steps & 0xFFFFFFFF, prompt_end, max_new
        params["context"], params["chunk"], params["num_pages"] = (
            self.emitted.plan.context,
            chunk,
            self.memory.num_pages,
        )
        ids = sorted(stop)
        if len(ids) > MAX_STOP_IDS:
            raise UserError(f"the CUDA kernel knows {MAX_STOP_IDS} stop tokens, {len(ids)} were given")
        params["num_stop_ids"] = len(ids)
        params["stop_ids"][: len(ids)] = ids
        return params

    def tokens(self):
        """Yields tokens as the kernel publishes them, until it ends. Raises UserError where all logits are NaN."""
        ring, seen = self.memory.ring, 0
        idle = 0
        while True:
            done = self.stream.query()
            count = int(ring[0])
            while seen < count:
                token = int(ring[HOST_WORDS + seen])
                if token < 0:
                    raise UserError("the model's logits are no numbers (NaN)", "are these weights whole?")
                yield token
                seen += 1
                idle = 0
            if done and seen == int(ring[0]):
                return
            idle += 1
            if idle > 50:
                self._rest(20e-6)

    def _rest(self, seconds: float) -> None:
        if self.while_waiting is not None:
            self.while_waiting()
        time.sleep(seconds)

    def stop(self) -> None:
        """Asks the kernel to end after its step."""
        self.memory.ring[1] = 1

    def abort(self) -> None:
        """Makes the kernel end at once: another rank is lost."""
        self.memory.ring[2] = 1

    def finish(self) -> int:
        """Waits for the end of the launch and returns the steps it ran. Raises UserError after an abort."""
        while self.while_waiting is not None and not self.stream.query():
            self._rest(100e-6)
        self.stream.synchronize()
        control = np.frombuffer(self.memory.control.cpu().numpy().tobytes(), CONTROL)[0]
        if control["abort"]:
            message = self._blame()
            if self.memory.symmetric is None:  # else peers may still signal: all ranks do it together
                self.reset_events()
            raise UserError(f"the kernel was aborted: {message}", "this is a bug of the kernel or its plan")
        ran = described(control, self.steps)
        self.steps = (self.steps + ran) & 0xFFFFFFFF
        return ran

    def elapsed_ms(self) -> float:
        """How long the last launch took by the GPU's clock; to be asked after `finish`."""
        return self.began.elapsed_time(self.ended)

    def reset_events(self, steps: int = 0) -> None:
        """Sets every counter to what it holds after `steps` steps, and forgets an abort."""
        import torch

        programs, step = self.emitted.programs, self.emitted.step
        totals = torch.tensor([programs.event_total[s.template] for s in step.stages], dtype=torch.int64)
        counters = torch.zeros(self.emitted.num_counters, EVENT_STRIDE, dtype=torch.int64)
        counters[: totals.numel(), 0] = totals.flatten() * steps
        self.memory.events.copy_(((counters + 2**31) % 2**32 - 2**31).to(torch.int32).flatten())
        self.memory.control.zero_()
        self.memory.reports.zero_()
        if self.memory.symmetric is not None:  # cleared for what crosses as data, on every rank before any starts
            self.memory.symmetric["inbox"].fill_(0xFF)
        self.steps = steps
        torch.cuda.synchronize()

    def _blame(self) -> str:
        """The SM that is furthest behind, in the plan's names."""
        reports = np.frombuffer(self.memory.reports.cpu().numpy().tobytes(), REPORT)
        return blame(self.emitted, reports, self.steps)


def control_of(first: np.ndarray, steps: int) -> np.ndarray:
    """`CONTROL` for a launch whose first step is `first` (a `STEP`), after `steps` earlier ones."""
    control = np.zeros((), CONTROL)
    control["published"] = (steps + 1) & 0xFFFFFFFF
    control["steps"]["number"] = steps & 0xFFFFFFFF  # of a step that is over, whatever the place
    slot = control["steps"][steps % STEP_SLOTS]
    slot["number"], slot["word"] = (steps + 1) & 0xFFFFFFFF, np.frombuffer(first.tobytes(), "<u4")
    return control


def described(control: np.ndarray, first_step: int) -> int:
    """How many steps after a launch's first one have a descriptor, the last of them saying: stop."""
    ahead = (control["steps"]["number"][:, 0].astype(np.int64) - first_step - 1) & 0xFFFFFFFF
    return int(max(n for n in ahead.tolist() if n < 2**31))


def blame(emitted: Emitted, reports: np.ndarray, first_step: int) -> str:
    """What SMs' reports (one `REPORT` per SM) say of why a launch that began with step `first_step` stood still.

    An SM whose workers have all that they were given waits for the event that its scheduler names. Others are at the
    task that they took last, and may look for values that never come: with claim pools the report says which that is.
    """
    stuck = []
    for sm, report in enumerate({name: int(r[name]) for name in REPORT_FIELDS} for r in reports):
        if report["set"]:
            waits = report["given"] == report["taken"]
            at = tuple(report[k] for k in ("step", "stage", "group", "task"))
            if not waits and not emitted.programs.pools:
                at = place_of(emitted, sm, report["taken"], first_step)
            stuck.append((at, not waits, sm, report))
    if not stuck:
        return "no SM left a report"
    (step, stage, group, task), working, sm, report = min(stuck, key=lambda s: s[:3])
    where, stages = f"SM {sm} in step {step}", emitted.step.stages
    if stage in (-1, len(stages)):
        return f"{where} waits for the next step's descriptor"
    template = emitted.step.templates[stages[stage].template]
    made = template.groups[group]
    where += f", stage {stage} ({template.name}, layer {stages[stage].layer})"
    if task == NO_MORE:
        doing = "do not leave" if working else "wait for their loader to claim from"
        return f"{where}: its workers {doing} the pool of '{made.name}'"
    what = f"{where}, task {task} of '{made.name}'"
    if working:
        makers = [w.event.partition(".done")[0] for w in made.tasks[task].waits if w.data]
        looking = (
            f", or look for values of {', '.join(map(repr, dict.fromkeys(makers)))} that do not come" if makers else ""
        )
        return f"{what}: its workers do not move{looking}"
    at, event = divmod(report["event"], len(emitted.programs.events))
    name = emitted.programs.events[event]
    return f"{what}: event '{name}' of stage {at} stands at {report['seen']}, wanted {report['wanted']}"


def place_of(emitted: Emitted, sm: int, taken: int, first_step: int) -> tuple[int, int, int, int]:
    """(step, stage, group, task) of what an SM's workers take after `taken` hand-overs; stage -1: a descriptor.

    In a plan without claim pools: what an SM takes of those its queue does not say.
    """
    queues = [emitted.step.templates[s.template].queues[sm] for s in emitted.step.stages]
    steps, at = divmod(taken, 1 + sum(map(len, queues)))
    step = (first_step + steps) & 0xFFFFFFFF
    if at == 0:
        return step, -1, 0, 0
    at -= 1
    for stage, queue in enumerate(queues):
        if at < len(queue):
            return step, stage, *queue[at]
        at -= len(queue)
    raise AssertionError("a step has as many hand-overs as it has tasks, and one")
