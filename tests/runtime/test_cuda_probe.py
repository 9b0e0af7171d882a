"""Both sides of the probes agree: the header and its mirror on the host. No GPU."""

from __future__ import annotations

import re

import pytest
from tiny_specs import child

from mpk_spec.emit.source import emit
from mpk_spec.errors import UserError
from mpk_spec.paths import templates_dir
from mpk_spec.planner import plan
from mpk_spec.runtime import cuda_launch, cuda_probe
from mpk_spec.schema import load_spec

WIDTH = {"u32": 4, "u64": 8}


def header(name: str) -> str:
    return re.sub(r"//.*", "", (templates_dir() / "runtime" / name).read_text())


def fields(text: str, struct: str) -> list[tuple[str, int]]:
    body = re.search(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)[1]
    found = []
    for declaration in (d.strip() for d in body.split(";") if d.strip()):
        kind, names = declaration.split(maxsplit=1)
        width = 8 if kind.endswith("*") else WIDTH[kind]
        found += [(n.strip(), width) for n in names.split(",")]
    return found


@pytest.mark.parametrize(
    ("struct", "dtype"),
    [
        ("TaskTimes", cuda_probe.TIMES),
        ("CopyTime", cuda_probe.COPIES),
        ("LogEntry", cuda_probe.LOG),
        ("Probes", cuda_probe.PROBES),
    ],
)
def test_structures_have_the_same_fields(struct, dtype):
    assert fields(header("probe.cuh"), struct) == [(n, dtype[n].itemsize) for n in dtype.names]


def test_defects_have_the_same_numbers():
    names = re.search(r"enum Defect : u32 \{(.*?)\}", header("probe.cuh"), re.DOTALL)[1].replace(" ", "").split(",")
    assert names[1:] == [name.replace("-", "_") for name in cuda_probe.KERNEL_DEFECTS]


def test_every_defect_is_planted_somewhere():
    text = "".join(path.read_text() for path in templates_dir().rglob("*.cuh"))
    for name in cuda_probe.KERNEL_DEFECTS:
        assert len(re.findall(rf"\b{name.replace('-', '_')}\b", text)) > 1, name


def test_probes_end_the_parameters():
    plain, probed = cuda_launch.PARAMS, cuda_launch.PROBED_PARAMS
    assert probed.fields["probes"][1] == plain.itemsize
    assert plain.itemsize % 8 == 0  # so C++ puts no padding before them


def test_places_have_names():
    made = emit(plan(load_spec("qwen3"), size="tiny", target="h100", context=64, verified=False))
    place = cuda_probe.find_place(made, "down_add", stage=1, task=2)
    template = made.step.templates[made.step.stages[1].template]
    assert template.groups[place.group].name == "down_add" and (place.stage, place.task) == (1, 2)
    with pytest.raises(UserError, match="stage 3 has no group 'qkv'"):
        cuda_probe.find_place(made, "qkv", stage=3)


@pytest.fixture
def probe(monkeypatch):
    """One in the memory of the CPU."""
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made = emit(plan(load_spec("qwen3"), size="tiny", target="h100:2", context=64, verified=False))
    return cuda_probe.Probe(made, "cpu", trace_steps=2, log_entries=3)


def test_a_probe_says_where_and_what(probe):
    probe.trace_step, probe.delay_seed, probe.defect = 2**32 + 5, 9, "wrong-page"
    probe.at = cuda_probe.Place(1, 2, 3)
    record = probe.record()
    assert (record["trace_step"], record["trace_steps"], record["log_capacity"], record["delay_seed"]) == (5, 2, 3, 9)
    assert cuda_probe.KERNEL_DEFECTS[record["defect"] - 1] == "wrong-page"
    assert (record["at_stage"], record["at_group"], record["at_task"]) == (1, 2, 3)
    assert 0 not in (record["times"], record["log"])


def test_what_the_kernel_wrote_is_read(probe):
    times = probe._times.numpy().view(cuda_probe.TIMES)[..., 0]
    times["signalled"][1, 1, 3, 2] = 77
    assert probe.times()["signalled"].sum() == probe.times()["signalled"][1, 1, 3, 2] == 77
    log = probe._log.numpy().view(cuda_probe.LOG)[..., 0]
    log["kind"][0, 0, :2], log["step"][0, 0, 1] = cuda_probe.WAIT, 4
    log["kind"][1, 1, 0] = cuda_probe.START
    (waits, none), (_, works) = probe.log()
    assert waits["step"].tolist() == [0, 4] and len(none) == 0 and works["kind"].tolist() == [cuda_probe.START]
    probe.clear()
    assert not probe.times()["signalled"].any() and all(len(part) == 0 for pair in probe.log() for part in pair)


def test_there_is_room_for_all_copies_of_the_recorded_steps(probe):
    assert probe.record()["copy_capacity"] == probe.copies().shape[1] == 2 ** (probe.copies().shape[1].bit_length() - 1)
    made = probe.emitted
    weights = sum(
        made.step.templates[s.template].groups[g].tasks[t].load_chunks
        for s in made.step.stages
        for g, t in made.step.templates[s.template].queues[0]
    )
    assert weights * probe.trace_steps <= probe.copies().shape[1]
    raw = probe._copies.numpy().view(cuda_probe.COPIES)[..., 0]
    raw["bytes"][1, 5] = 4096
    assert probe.copies()["bytes"].sum() == probe.copies()["bytes"][1, 5] == 4096
    probe.clear()
    assert not probe.copies()["bytes"].any()


def test_copies_of_the_cache_count_by_passes_and_blocks():
    """16 query heads of a KV head are two passes of 8; a split reads every second of the blocks, keys and values."""
    assert f"rows = {cuda_probe.QUERY_ROWS};" in header("program.cuh")

    def most(context: int) -> int:
        config = {**load_spec("qwen3").sizes["tiny"].config, "num_attention_heads": 16, "num_key_value_heads": 1}
        rules = [{"set": {"attend": {"kv_splits": 2}}}]
        spec = child("qwen3", config, schedule=rules)
        return cuda_probe._most_copies(emit(plan(spec, size="tiny", target="h100:1", context=context, verified=False)))

    layers = 3
    assert most(256) - most(128) == layers * 2 * 2 * 2  # one SM has both splits: two blocks more


def test_a_full_log_is_no_evidence(probe):
    probe._log.numpy().view(cuda_probe.LOG)[..., 0]["kind"][1, 0] = cuda_probe.WAIT
    with pytest.raises(UserError, match="the log of SM 1 is full after 3 entries"):
        probe.log()
