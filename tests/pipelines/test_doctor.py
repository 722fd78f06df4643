"""Doctor's findings on a healthy machine, and for each problem that it knows."""

import json
import os
import sys
from pathlib import Path

import pytest
from messages import assert_names

from pipelines.checks.disk_checks import check_data, check_run_folder, check_weight_files
from pipelines.checks.environment_checks import LAUNCH_VARIABLES, RULES, check_accelerate_file, check_environment
from pipelines.checks.findings import Finding
from pipelines.checks.machine_checks import check_cpu, check_gpus, check_packages
from pipelines.checks.two_processes import check_two_processes
from twostage.core.machine import processes

TIME_LIMIT = 300  # seconds for two processes on a busy machine


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {name for rule in RULES for name in rule.names} | {"HF_HUB_CACHE"}
    for name in {
        *names,
        *LAUNCH_VARIABLES,
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "no_proxy",
        "NO_PROXY",
    }:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hugging_face"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def trouble(findings: list[Finding]) -> list[Finding]:
    """Warnings and problems; each of them, and nothing else, comes with advice."""
    assert all(bool(finding.advice) == (finding.status != "ok") for finding in findings)
    return [finding for finding in findings if finding.status != "ok"]


def test_a_healthy_machine(twostage, tmp_path):
    file = tmp_path / "doctor.json"
    ended = twostage("doctor", "--run-dir", tmp_path / "runs", "--time-limit", TIME_LIMIT, "--json", file)
    assert ended.code == 0, ended.out
    document = json.loads(file.read_text())
    assert document["counts"]["problem"] == 0
    topics = {finding["topic"] for finding in document["findings"]}
    assert topics >= {"python", "packages", "CPU", "environment", "accelerate", "run folder", "data", "weights"}
    (processes,) = (finding for finding in document["findings"] if finding["topic"] == "two processes")
    assert processes["status"] == "ok"
    assert_names(processes["message"], "16 MiB", "gloo", "the CPU")
    assert "run folder" in ended.out
    assert ended.out.rstrip().endswith("0 problems")
    assert all(len(line) <= 120 for line in ended.out.splitlines() if "/" not in line)
    assert not (tmp_path / "runs").exists()


def test_problems_exit_with_1(twostage, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "runs").write_text("a file")
    ended = twostage("doctor", "--run-dir", tmp_path / "runs" / "more", "--time-limit", "0.01")
    assert ended.code == 1
    text = " ".join(ended.out.split())
    assert_names(text, "RANK=3, WORLD_SIZE=4", "unset RANK WORLD_SIZE", "is a file", "0.01 s", "--time-limit")
    assert text.endswith("3 problems")


def test_two_processes_that_cannot_connect(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    assert [f.status for f in check_environment()] == ["problem"]
    (finding,) = check_two_processes(TIME_LIMIT)
    assert finding.status == "problem"
    assert_names(finding.message, "of two on the CPU failed")
    assert finding.advice


def test_a_json_file_that_cannot_be_written(twostage, tmp_path):
    ended = twostage("doctor", "--json", tmp_path / "nowhere" / "doctor.json")
    assert ended.code == 2
    assert_names(ended.err, "--json", tmp_path / "nowhere" / "doctor.json", "existing folder")


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_a_run_folder_is_left_unchanged(tmp_path):
    (tmp_path / "kept").write_text("content")
    (finding,) = check_run_folder(tmp_path)
    assert finding.status in ("ok", "warning")  # the disk may be slow, or in memory
    assert_names(finding.message, tmp_path, "GB free", "MB/s")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_run_folder_that_does_not_exist(tmp_path):
    (finding,) = check_run_folder(tmp_path / "a" / "b")
    assert_names(finding.message, tmp_path / "a" / "b", "does not exist", f"created in {tmp_path})")
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, which nobody can write to")
def test_a_run_folder_that_is_not_writable():
    (finding,) = check_run_folder(Path("/proc/runs"))
    assert finding.status == "problem"
    assert_names(finding.message, "/proc/runs", "not writable")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_read_only_run_folder(tmp_path):
    tmp_path.chmod(0o500)
    (finding,) = check_run_folder(tmp_path)
    tmp_path.chmod(0o700)
    assert finding.status == "problem"
    assert "Permission denied" in finding.message


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a folder in memory")
def test_a_run_folder_in_memory():
    (finding,) = trouble(list(check_run_folder(Path("/dev/shm"))))
    assert_names(finding.message, "tmpfs", "in memory")
    assert_names(finding.advice, "on a disk")


# --- the environment --------------------------------------------------------------------------------------------------


def test_a_clean_environment():
    assert [finding.status for finding in check_environment()] == ["ok"]


@pytest.mark.parametrize(
    ("name", "bad", "good", "status"),
    [
        ("CUDA_VISIBLE_DEVICES", "", "0,1", "warning"),
        ("OMP_NUM_THREADS", "many", "4", "problem"),
        ("OMP_NUM_THREADS", "0", "1", "problem"),
        ("MKL_NUM_THREADS", "many", "4", "problem"),
        ("TORCH_DISTRIBUTED_DEBUG", "detail", "INFO", "warning"),
        ("CUDA_LAUNCH_BLOCKING", "1", "0", "warning"),
        ("NCCL_SOCKET_IFNAME", "nowhere", "^docker", "problem"),
        ("GLOO_SOCKET_IFNAME", "nowhere", "lo", "problem"),
        ("HF_HUB_OFFLINE", "1", "0", "warning"),
        ("MASTER_ADDR", "10.0.0.1", None, "warning"),
        ("LOCAL_RANK", "0", None, "problem"),
        ("http_proxy", "foo://proxy", "http://proxy:3128", "warning"),
        ("all_proxy", "socks4://user:secret@proxy:1", "", "warning"),
    ],
)
def test_variables(monkeypatch, name, bad, good, status):
    monkeypatch.setenv(name, bad)
    (finding,) = trouble(list(check_environment()))
    assert finding.status == status
    assert name in finding.message
    if good is not None:
        monkeypatch.setenv(name, good)
        assert [finding.status for finding in check_environment()] == ["ok"]


def test_the_password_of_a_proxy_is_not_shown(monkeypatch):
    monkeypatch.setenv("all_proxy", "foo://user:secret@proxy:1")
    (finding,) = check_environment()
    assert "secret" not in finding.message + finding.advice


def test_the_number_of_threads_is_what_the_variable_sets(monkeypatch):
    (cores, _) = check_cpu()
    assert "OMP_NUM_THREADS" not in cores.message
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (cores, precision) = check_cpu()
    assert "(OMP_NUM_THREADS=1)" in cores.message  # torch read the number itself when it was loaded
    assert precision.message.startswith("train.mixed_precision=auto means ")


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        (None, "ok", "every GPU, or one process"),
        ("num_processes: 2\nmixed_precision: bf16\nuse_cpu: true\n", "ok", "num_processes 2, mixed_precision bf16"),
        ("num_processes: 2\nnum_machines: 3\n", "problem", "2 other machines"),
        ("a: [", "problem", "cannot be read"),
        ("words", "problem", "expected keys and values"),
    ],
)
def test_the_default_file_of_accelerate(tmp_path, text, status, words):
    file = tmp_path / "hugging_face" / "accelerate" / "default_config.yaml"
    if text:
        file.parent.mkdir(parents=True)
        file.write_text(text)
    (finding,) = check_accelerate_file()
    assert finding.status == status
    assert words in finding.message
    assert str(file) in finding.message


# --- packages, devices, files -----------------------------------------------------------------------------------------


def test_packages_of_the_wrong_version(tmp_path, monkeypatch):
    (tmp_path / "twostage-9.dist-info").mkdir()
    (tmp_path / "twostage-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: twostage\nVersion: 9\nRequires-Python: >=9.0\nRequires-Dist: torch>=99.0\n"
        'Requires-Dist: no-such-package>=1.0\nRequires-Dist: numpy>=1.0\nRequires-Dist: pillow>=99; extra == "app"\n'
        'Requires-Dist: pytest>=99; extra == "dev"\nRequires-Dist: no-such-either; extra == "export"\n'
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = list(check_packages())
    by_name = {finding.message.split(":")[0].split(" ")[0]: finding.status for finding in trouble(found)}
    assert by_name.pop(sys.version.split()[0]) == "problem"
    assert by_name == {
        "torch": "problem",
        "no-such-package": "problem",
        "pillow": "warning",
        "no-such-either": "warning",
    }
    assert any("pip install --upgrade 'torch>=99.0'" in finding.advice for finding in found)
    assert [finding.message.split()[0] for finding in found if finding.status == "ok"] == ["numpy"]


def test_gpus():
    assert [finding.topic for finding in check_gpus()]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_limit_of_a_container(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processes.limit_of_container(tmp_path) == cores


@pytest.mark.parametrize(
    ("variables", "limit", "busy", "advice"),
    [
        ({}, None, 1.9, "Stop other programs, or export OMP_NUM_THREADS=1."),
        ({"OMP_NUM_THREADS": "1"}, None, 1.9, "Stop other programs."),
        ({"MKL_NUM_THREADS": "2"}, None, 1.9, "Stop other programs, or export MKL_NUM_THREADS=1."),
        ({"OMP_NUM_THREADS": "2"}, 1.5, 0.0, "export OMP_NUM_THREADS=1"),
        ({}, 0.5, 0.0, "Give the container at least one whole core."),
        ({}, 2.0, 0.0, ""),
    ],
)
def test_the_advice_about_threads_can_be_followed(monkeypatch, variables, limit, busy, advice):
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(processes, "limit_of_container", lambda: limit)
    monkeypatch.setattr(processes, "busy_cores", lambda: busy)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(processes.torch, "get_num_threads", lambda value=value: int(value))
    (cores, _) = check_cpu()
    assert (cores.advice, cores.status) == (advice, "warning" if advice else "ok")


def test_datasets_and_cache(tmp_path, monkeypatch):
    sets, cache = check_data()
    assert (sets.status, cache.status) == ("warning", "ok")
    (tmp_path / "data" / "birds").mkdir(parents=True)
    (tmp_path / "hugging_face" / "hub" / "datasets--ylecun--mnist").mkdir(parents=True)
    monkeypatch.setenv("TWOSTAGE_DATA", str(tmp_path / "data"))
    sets, cache = check_data()
    assert sets.message.endswith("data: birds")
    assert cache.message.endswith("datasets ylecun/mnist")
    monkeypatch.setenv("TWOSTAGE_DATA", str(tmp_path / "nowhere"))
    assert next(check_data()).status == "problem"


def test_weights_are_searched_where_they_are_loaded_from(tmp_path):
    assert [finding.status for finding in check_weight_files()] == ["warning", "warning"]
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("vgg16-397923af.pth", "weights-inception-2015-12-05-6726825d.pth"):
        (folder / name).write_bytes(b"weights")
    lpips, inception = check_weight_files()
    assert (lpips.status, inception.status) == ("ok", "ok")
    assert_names(lpips.message, folder / "vgg16-397923af.pth")
    assert_names(inception.message, f"--inception {folder}")
