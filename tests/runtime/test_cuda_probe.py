"""Both sides of the probes agree: the header and its mirror on the host. No GPU."""

from __future__ import annotations

import re

import pytest

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
    [("TaskTimes", cuda_probe.TIMES), ("LogEntry", cuda_probe.LOG), ("Probes", cuda_probe.PROBES)],
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
