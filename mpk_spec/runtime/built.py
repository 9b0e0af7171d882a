"""A folder that `mpk-spec build` made: plan, cubin and a manifest that says what they are, run without any compiler.

The manifest is checked against what is there and against this installation before anything is loaded: the kernel and
the host share structures and the packing of weights, so a cubin runs only with the sources that it was built from.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError
from mpk_spec.planner.plan import Plan

if TYPE_CHECKING:
    from mpk_spec.emit.source import Emitted
    from mpk_spec.weights import Checkpoint

CUBIN, SOURCE, PLAN, MANIFEST = "megakernel.cubin", "megakernel.cu", "plan.json", "manifest.json"
FILES = (CUBIN, SOURCE, PLAN, MANIFEST)
FORMAT = 1
SAYS = {"plan": str, "cubin": str, "source": str, "mpk_spec": str, "weights": list, "config": dict}  # of the manifest
AGAIN = "build it again: mpk-spec build SPEC --size NAME -o FOLDER"


@dataclass(frozen=True)
class Build:
    """A checked build. `weights`: where the size's weights are; `config`: the keys that its numbers rest on."""

    folder: Path
    plan: Plan
    emitted: Emitted
    cubin: bytes
    weights: tuple[str, ...]
    config: dict[str, Any]


def is_build(name: str) -> bool:
    """Whether `name` is a folder that `mpk-spec build` made, perhaps a damaged one."""
    folder = Path(name).expanduser()
    return (folder / CUBIN).is_file() or ((folder / MANIFEST).is_file() and (folder / PLAN).exists())


def open_build(name: str) -> Build:
    """Reads and checks a build. Raises UserError for one that is damaged or of another version of mpk-spec."""
    from mpk_spec.emit.source import emit
    from mpk_spec.planner.plan_io import read_plan

    folder = Path(name).expanduser()
    manifest = _manifest(folder)
    try:
        plan = read_plan(folder / PLAN)
    except UserError as error:
        raise UserError(error.message, AGAIN) from None
    cubin = _read(folder / CUBIN)
    if plan.key != manifest["plan"]:
        raise UserError(
            f"{folder / PLAN} is not the plan that the manifest names, or mpk-spec {manifest['mpk_spec']} wrote it "
            "otherwise than this one reads it",
            AGAIN,
        )
    if digest(cubin) != manifest["cubin"]:
        raise UserError(f"{folder / CUBIN} is not the kernel that the manifest names, or is cut short", AGAIN)
    emitted = emit(plan)
    if source_digest(emitted.source) != manifest["source"]:
        raise UserError(
            f"{folder} was built by mpk-spec {manifest['mpk_spec']} from other sources than mpk-spec {_version()} has",
            AGAIN,
        )
    return Build(folder, plan, emitted, cubin, tuple(manifest["weights"]), manifest["config"])


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read(folder / MANIFEST))
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is no manifest: {error}", AGAIN) from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(f"{folder} is a build of format {found}, this mpk-spec reads format {FORMAT}", AGAIN)
    missing = SAYS.keys() - manifest.keys()
    if missing:
        raise UserError(f"{folder / MANIFEST} does not say: {', '.join(sorted(missing))}", AGAIN)
    wrong = sorted(key for key, kind in SAYS.items() if not isinstance(manifest[key], kind))
    if wrong or not all(isinstance(source, str) for source in manifest["weights"]):
        raise UserError(f"{folder / MANIFEST} is damaged: {', '.join(wrong or ['weights'])}", AGAIN)
    return manifest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", AGAIN) from None


def _version() -> str:
    from mpk_spec import __version__

    return __version__


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def source_digest(source: str) -> str:
    """Of the generated source and the headers that it includes."""
    from mpk_spec.paths import templates_dir

    headers = sorted(p for kind in ("runtime", "tasks") for p in (templates_dir() / kind).glob("*.cuh"))
    return digest(b"\0".join([source.encode(), *(p.name.encode() + p.read_bytes() for p in headers)]))


def open_weights(build: Build, source: str | None, progress) -> Checkpoint:
    """The checkpoint of a build: `source`, or the first of the size's own that can be had.

    Raises UserError where there is none, and for a checkpoint of another model.
    """
    from mpk_spec.weights import open_checkpoint

    if source is None and not build.weights:
        raise UserError(
            f"{build.folder} does not say where its weights are",
            "give a checkpoint with --weights FOLDER, or ask for made-up weights with --weights random:0",
        )
    sources = [source] if source is not None else list(build.weights)
    for number, one in enumerate(sources):
        try:
            opened = _random(build, one) if one.startswith("random:") else open_checkpoint(one, progress=progress)
            break
        except UserError:
            if number + 1 == len(sources):
                raise
    check_config(build, opened)
    return opened


def _random(build: Build, source: str) -> Checkpoint:
    from mpk_spec.runtime.random_model import checkpoint_of_plan

    seed = source.partition(":")[2]
    if not seed.isdecimal():
        raise UserError(f"'{source}' has no seed: random weights are written random:SEED, for example random:0")
    return checkpoint_of_plan(build.plan, int(seed))


def check_config(build: Build, checkpoint: Checkpoint) -> None:
    """Raises UserError for a checkpoint whose config is not the one that the kernel's numbers were computed from."""
    from mpk_spec.weights import text_config

    plan = build.plan
    if checkpoint.architecture != plan.architecture:
        raise UserError(f"{build.folder} runs {plan.architecture}, {checkpoint.source} is a {checkpoint.architecture}")
    theirs = text_config(checkpoint.config)
    for key, ours in build.config.items():
        if theirs.get(key) != ours:
            raise UserError(
                f"{build.folder} was built for {plan.spec} {plan.size} with {key} = {ours}, "
                f"{checkpoint.source} has {theirs.get(key)}",
                "another size of the spec may be this checkpoint's",
            )
