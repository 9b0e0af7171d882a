"""What a command is about: from `smollm2`, `./my.yaml` or `./checkpoint-dir` to a spec, a size and its weights."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpk_spec.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mpk_spec.progress import Progress
    from mpk_spec.runtime.built import Build
    from mpk_spec.schema import Spec
    from mpk_spec.weights import Checkpoint

SOURCE_SCHEMES = ("hub:", "pypi:", "dir:")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")
STAND_INS = ("tiny", "common")  # sizes that are no model a person would talk with


@dataclass(frozen=True)
class Target:
    """A model to run. `size` is None where the checkpoint is no size that the spec names.

    A build has its plan and needs no spec: `spec` is None then.
    """

    spec: Spec | None
    size: str | None
    checkpoint: Checkpoint
    build: Build | None = None

    @property
    def name(self) -> str:
        """The spec's."""
        return self.build.plan.spec if self.build else self.spec.name


def open_target(
    name: str, progress: Progress, size: str | None = None, weights: str | None = None, spec: str | None = None
) -> Target:
    """Finds and opens what a command line asks for. Raises SpecError or UserError with what would work.

    `name` is a spec (file or bare name), a folder that `build` made, or a checkpoint (folder, .gguf file, `hub:` or
    `pypi:` source). With a checkpoint, `spec` names the spec to read it with; without, its architecture decides.
    """
    from mpk_spec.runtime.built import is_build, open_build, open_weights
    from mpk_spec.schema import load_spec

    if is_build(name):
        if size is not None or spec is not None:
            raise UserError(f"'{name}' is a build: its plan says what it is, --size and --spec have no place beside it")
        build = open_build(name)
        return Target(None, build.plan.size, open_weights(build, weights, progress), build)
    if is_checkpoint(name):
        if weights is not None:
            raise UserError(f"'{name}' is a checkpoint already: --weights has no place beside it")
        return _of_checkpoint(name, progress, size, spec)
    if spec is not None:
        raise UserError(f"'{name}' is a spec already: --spec is for checkpoints")
    loaded = load_spec(name)
    if weights is not None:
        if weights.startswith("random:"):
            size = size or next(iter(loaded.sizes))
        checkpoint = _open(weights, progress, loaded, size)
        check_architecture(loaded, checkpoint)
        return Target(loaded, size or matching_size(loaded, checkpoint), checkpoint)
    size = size or default_size(loaded)
    return Target(loaded, size, _open_first(loaded, size, progress))


def is_checkpoint(name: str) -> bool:
    """Whether `name` means weights rather than a spec. An OWNER/NAME that is no file here is a hub id.

    The bare name of a spec means that spec also where a folder of the same name lies: './qwen3' means the folder.
    """
    from mpk_spec.schema import spec_names

    if name in spec_names():
        return False
    path = Path(name).expanduser()
    if name.startswith(SOURCE_SCHEMES) or name.endswith(".gguf") or path.is_dir():
        return True
    return bool(HUB_ID.fullmatch(name)) and path.suffix not in (".yaml", ".yml") and not path.exists()


def default_size(spec: Spec) -> str:
    """The first size in the file that has weights and is no stand-in."""
    for name, size in spec.sizes.items():
        if name not in STAND_INS and size.weights:
            return name
    raise UserError(
        f"no size of '{spec.name}' says where its weights are",
        hint="give a checkpoint with --weights FOLDER, or ask for made-up weights with --size tiny --weights random:0",
    )


def first_size(spec: Spec) -> str:
    """The size to plan where none is named: the first that is no stand-in, else the first; said on standard error."""
    if not spec.sizes:
        raise UserError(f"'{spec.name}' names no sizes", hint="give a checkpoint instead of the spec")
    chosen = next((name for name in spec.sizes if name not in STAND_INS), next(iter(spec.sizes)))
    print(f"planning size {chosen} of {', '.join(spec.sizes)} (--size chooses another)", file=sys.stderr)
    return chosen


def check_size(spec: Spec, size: str) -> None:
    if size not in spec.sizes:
        raise UserError(f"'{spec.name}' has no size '{size}'", hint=did_you_mean(size, spec.sizes, "sizes"))


def _open(source: str, progress: Progress, spec: Spec, size: str | None) -> Checkpoint:
    from mpk_spec.weights import open_checkpoint

    scheme, _, seed = source.partition(":")
    if scheme != "random":
        return open_checkpoint(source, progress=progress)
    if not seed.isdecimal():
        raise UserError(f"'{source}' has no seed: random weights are written random:SEED, for example random:0")
    from mpk_spec.runtime.random_model import random_checkpoint

    check_size(spec, size)
    return random_checkpoint(spec, size, int(seed))


def _open_first(spec: Spec, size: str, progress: Progress) -> Checkpoint:
    """Opens the first source of a size that can be had; says on standard error which could not and why."""
    from mpk_spec.weights.cache import CacheFolderError

    check_size(spec, size)
    sources = spec.sizes[size].weights
    if not sources:
        raise UserError(
            f"size '{size}' of '{spec.name}' does not say where its weights are",
            hint="give a checkpoint with --weights FOLDER, or ask for made-up weights with --weights random:0",
        )
    for source in sources[:-1]:
        try:
            return _open(source, progress, spec, size)
        except CacheFolderError:
            raise
        except UserError as error:
            print(f"{source}: {error}; trying the next source of this size", file=sys.stderr)
    return _open(sources[-1], progress, spec, size)


def _of_checkpoint(name: str, progress: Progress, size: str | None, spec_name: str | None) -> Target:
    from mpk_spec.schema import load_spec
    from mpk_spec.weights import open_checkpoint

    if size is not None:
        raise UserError(f"'{name}' is a checkpoint: its config says its size, --size has no place beside it")
    checkpoint = open_checkpoint(name, progress=progress)
    if spec_name is not None:
        spec = load_spec(spec_name)
        check_architecture(spec, checkpoint)
    else:
        spec = spec_for(checkpoint)
    return Target(spec, matching_size(spec, checkpoint), checkpoint)


def spec_for(checkpoint: Checkpoint) -> Spec:
    """The spec that reads a checkpoint: one whose `architectures` has its class.

    Several specs may read the same class (Llama's is also SmolLM2's). Then the one that lists this very model among
    its sizes is taken, else the first by name, since any of them describes the class; standard error says which.
    """
    from mpk_spec.paths import specs_dir
    from mpk_spec.schema import load_spec

    specs = [load_spec(str(path)) for path in sorted(specs_dir().glob("*.yaml"))]
    able = [spec for spec in specs if checkpoint.architecture in spec.model.architectures]
    if not able:
        known = sorted({name for spec in specs for name in spec.model.architectures})
        raise UserError(
            f"no spec reads {checkpoint.architecture}, the architecture of {checkpoint.source}",
            hint=f"'mpk-spec new --from {checkpoint.source}' drafts one; known architectures: {', '.join(known)}",
        )
    exact = [spec for spec in able if matching_size(spec, checkpoint)]
    chosen = (exact or able)[0]
    if len(able) > 1:
        names = ", ".join(spec.name for spec in able)
        why = f"size {matching_size(chosen, checkpoint)}" if exact else "--spec chooses another"
        print(f"{checkpoint.architecture} is read by {names}; taking {chosen.name} ({why})", file=sys.stderr)
    return chosen


def matching_size(spec: Spec, checkpoint: Checkpoint) -> str | None:
    """The size of the checkpoint's shape, or None: every whole number and switch of its config is the checkpoint's too.

    Other keys, such as the rope's base or epsilon, and the longest context differ between tunes of one model.
    """
    from mpk_spec.weights import text_config

    config = text_config(checkpoint.config)
    for name, size in spec.sizes.items():
        shape = {k: v for k, v in size.config.items() if isinstance(v, int) and k != "max_position_embeddings"}
        if name not in STAND_INS and shape.items() <= config.items():
            return name
    return None


def check_architecture(spec: Spec, checkpoint: Checkpoint) -> None:
    if checkpoint.architecture not in spec.model.architectures:
        raise UserError(
            f"'{spec.name}' reads {', '.join(spec.model.architectures)} "
            f"and {checkpoint.source} is a {checkpoint.architecture}"
        )
