"""The files of configs/accelerate/: accelerate's own launcher reads them, and those without a GPU are launched."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from twostage.core.machine.sharding import units_to_shard

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
PROCESSES = {"cpu_2": 2, "gpu_8": 8, "two_machines": 16, "fsdp_8": 8, "fsdp_cpu_2": 2}

# Every process joins, and all add up their numbers.
ADD = """
import sys
import torch
from accelerate.utils import reduce
from twostage.core.machine.processes import join_processes
state = join_processes()
total = reduce(torch.tensor(state.process_index + 1.0, device=state.device), "sum").item()
print(f"{state.process_index} of {state.num_processes}: {total}\\n", end="", flush=True)  # one write: two print at once
state.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(file: str, *words: object) -> subprocess.Popen[str]:
    """`accelerate launch --config_file configs/accelerate/FILE.yaml WORDS`."""
    config = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_all_files_are_tested():
    assert {file.stem for file in FILES} == PROCESSES.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file_and_its_header_is_its_command(file, monkeypatch):
    lines = file.read_text(encoding="utf-8").splitlines()
    header = [line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    assert any(line.startswith(f"accelerate launch --config_file configs/accelerate/{file.name} ") for line in header)
    assert isinstance(load_config_from_file(str(file)), ClusterConfig)
    given = ["--config_file", str(file), "--main_process_ip", "10.0.0.1", "--machine_rank", "1"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*given, "-m", "stage2_prior"]))
    assert arguments.num_processes == PROCESSES[file.stem]
    assert arguments.use_fsdp == file.stem.startswith("fsdp")
    if file.stem == "two_machines":
        assert (arguments.num_machines, arguments.machine_rank, arguments.main_process_ip) == (2, 1, "10.0.0.1")
    if arguments.use_fsdp:
        for name, value in prepare_multi_gpu_env(arguments).items():
            if name.startswith(("FSDP", "ACCELERATE_USE_FSDP")):
                monkeypatch.setenv(name, value)
        assert units_to_shard(shardable=True) == ["Block"]


def test_two_machines_find_each_other(tmp_path):
    """Two launchers as on two machines, with one process each."""
    script, port = tmp_path / "add.py", free_port()
    script.write_text(ADD, encoding="utf-8")
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--num_processes", 2]
    machines = [start("two_machines", *where, "--machine_rank", rank, script) for rank in (0, 1)]
    for rank, machine in enumerate(machines):
        out, err = machine.communicate(timeout=240)
        assert machine.returncode == 0, err
        assert f"{rank} of 2: 3.0" in out


@pytest.mark.parametrize("file", ["cpu_2", "fsdp_cpu_2"])
def test_the_files_for_a_cpu_start_two_processes(tmp_path, file):
    script = tmp_path / "add.py"
    script.write_text(ADD, encoding="utf-8")
    started = start(file, "--main_process_port", free_port(), script)
    out, err = started.communicate(timeout=240)
    assert started.returncode == 0, err
    assert {"0 of 2: 3.0", "1 of 2: 3.0"} <= set(out.splitlines())
