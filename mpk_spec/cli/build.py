"""`mpk-spec build`: the plan of a size, compiled into one CUDA kernel, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from mpk_spec.emit.compiler import Compiled
    from mpk_spec.planner.plan import Plan
    from mpk_spec.schema import Spec


def command(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A spec file or the name of one.")],
    size: Annotated[
        str | None, typer.Option(metavar="NAME", help="A size of the spec; default: its first real one.")
    ] = None,
    target: Annotated[str, typer.Option(metavar="NAME", help="The GPU to compile for.")] = "h100",
    tp: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs that run it together, one rank each.")] = 1,
    context: Annotated[
        int | None, typer.Option("-c", "--context", min=1, metavar="N", help="Positions of the KV cache.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Also put cubin, source and plan there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Plan, prove and compile: one CUDA kernel for a spec's size. Needs NVRTC, but no GPU.

    With several ranks all run the same kernel, each on its share of the weights.
    """
    import json

    from mpk_spec.cli.target import first_size
    from mpk_spec.emit.compiler import compile_kernel
    from mpk_spec.emit.source import emit
    from mpk_spec.planner import plan
    from mpk_spec.planner.targets import find_target
    from mpk_spec.schema import load_spec

    loaded = load_spec(spec)
    made = plan(loaded, size=size or first_size(loaded), target=target, tp=tp, context=context)
    emitted = emit(made)
    compiled = compile_kernel(made.name, emitted.source, find_target(target).arch)
    report = manifest(loaded, made, emitted.source, compiled)
    if output is not None:
        write(output, made, emitted.source, compiled.cubin, report)
    print(json.dumps(report, indent=2) if as_json else _readable(report, compiled))


def manifest(spec: Spec, plan: Plan, source: str, compiled: Compiled) -> dict[str, Any]:
    """What was built, from what, by what; what `mpk_spec.runtime.built` checks before it runs it elsewhere."""
    from mpk_spec import __version__
    from mpk_spec.runtime.built import FORMAT, digest, source_digest

    report = compiled.report
    return {
        "format": FORMAT, "mpk_spec": __version__, "plan": plan.key, "cubin": digest(compiled.cubin),
        "source": source_digest(source), "weights": list(spec.sizes[plan.size].weights),
        "config": numbers_rest_on(spec, plan), "spec": plan.spec, "size": plan.size, "target": plan.target,
        "tp": plan.tp, "arch": report.arch, "num_sms": plan.num_sms, "context": plan.context,
        "compiler": report.compiler, "registers": report.registers,
        "spill_bytes": report.spill_bytes, "ring_bytes": plan.ring_bytes, "cubin_bytes": len(compiled.cubin),
        "compile_seconds": report.seconds, "cached": compiled.cached,
    }  # fmt: skip


def numbers_rest_on(spec: Spec, plan: Plan) -> dict[str, Any]:
    """The keys of the config that the spec mentions, with the values that were planned with.

    Not the longest context, which differs between tunes of one model and which the plan has its own of.
    """
    import re

    from mpk_spec.weights import text_config

    mentioned = set(re.findall(r"\bconfig\.(\w+)", spec.resolved_yaml())) - {"max_position_embeddings"}
    config = text_config(plan.config)
    return {key: config[key] for key in sorted(mentioned) if key in config}


def _readable(report: dict[str, Any], compiled: Compiled) -> str:
    how = "from the cache" if report["cached"] else f"in {report['compile_seconds']} s"
    gpus = report["target"] if report["tp"] == 1 else f"{report['tp']} x {report['target']}"
    return (
        f"{report['spec']} {report['size']} for {gpus} ({report['arch']}): compiled {how} by "
        f"{report['compiler']}, {report['registers']} registers a thread, {report['spill_bytes']} bytes spilled, "
        f"ring {report['ring_bytes'] // 1024} KiB, cubin {report['cubin_bytes'] // 1024} KiB\n{compiled.folder}"
    )


def write(folder: Path, plan: Plan, source: str, cubin: bytes, report: dict[str, Any]) -> None:
    """The folder, written aside and renamed. Replaces an earlier build; refuses a folder with anything else in it."""
    import json
    import shutil
    import tempfile

    from mpk_spec.runtime.built import FILES

    strangers = sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.is_dir() else []
    if strangers or folder.is_file():
        raise UserError(f"{folder} is no build: it holds {', '.join(strangers[:3]) or 'a file'}", "name a new folder")
    contents = (cubin, source.encode(), plan.to_json().encode(), json.dumps(report, indent=2).encode())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "."))
        for name, data in zip(FILES, contents, strict=True):
            (aside / name).write_bytes(data)
        if folder.is_dir():
            shutil.rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
