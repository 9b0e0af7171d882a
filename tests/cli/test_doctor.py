from __future__ import annotations

import json

import pytest

from mpk_spec import errors
from mpk_spec.cli.main import main
from mpk_spec.doctor import host
from mpk_spec.doctor.gpu import judge_nvshmem

NAMES = ["python", "torch", "transformers", "packages", "driver", "gpus", "nvrtc", "nvshmem", "cache", "disk"]


def test_doctor_finds_this_machine_fit_for_the_cpu(capsys):
    assert main(["doctor"]) == errors.EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "hint:" not in line] == NAMES


def test_doctor_as_json(capsys):
    assert main(["doctor", "--json"]) == errors.EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in found] == NAMES
    assert found[1]["data"]["version"][0].isdigit()


def test_doctor_fails_where_chat_on_the_cpu_would(capsys, monkeypatch, own_cache):
    monkeypatch.setattr(host, "installed", lambda package: "4.57.1" if package == "transformers" else "1.0")
    own_cache.write_text("a file where the folder should be")
    assert main(["doctor"]) == errors.EXIT_BAD_INPUT
    shown = capsys.readouterr()
    assert "XX  transformers  4.57.1 is too old" in shown.out
    assert shown.err == "error: chatting on the CPU needs these to work: transformers, cache\n"


def test_a_package_that_cannot_be_imported_is_broken(monkeypatch):
    monkeypatch.setattr(host, "CPU_PACKAGES", ("json", "no_such_package"))
    found = host.find_packages()
    assert (found.status, found.says) == ("broken", "no_such_package: No module named 'no_such_package'")


def test_little_disk_is_a_warning(monkeypatch):
    monkeypatch.setattr(host.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 3e8}))
    found = host.find_disk()
    assert (found.status, found.says) == ("warning", "0.3 GB free for the cache")


@pytest.mark.parametrize(
    ("cu12", "cu13", "torch_cuda", "status", "words"),
    [
        (None, None, "13.0", "absent", "only several GPUs need it"),
        ("3.4.5", None, "12.8", "ok", "nvidia-nvshmem-cu12 3.4.5"),
        (None, "3.4.5", None, "ok", "nvidia-nvshmem-cu13 3.4.5"),
        ("3.4.5", None, "13.0", "warning", "torch is built for CUDA 13.0"),
        ("3.4.5", "3.4.5", "12.8", "warning", "both write nvidia/nvshmem/lib"),
    ],
)
def test_nvshmem_and_its_mixes(cu12, cu13, torch_cuda, status, words):
    found = judge_nvshmem({"12": cu12, "13": cu13}, torch_cuda)
    assert found.status == status
    assert words in found.says


def test_a_mix_names_the_package_to_keep():
    found = judge_nvshmem({"12": "3.4.5", "13": "3.4.5"}, "12.8")
    assert found.hint.endswith("then pip install nvidia-nvshmem-cu12")
