"""The environment of a command (variables, launchers, terminals, fonts) does not change what it does."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import PartialState
from messages import assert_names, refuses
from PIL import Image

from pipelines.saved.proxies import broken_proxy
from stage1_tokenizer.tokenizer_training import TokenizerConfig
from twostage.core.config.sections import parse_config
from twostage.core.machine import launch, precision, processes, progress
from twostage.core.machine.launch import Launch, _command, is_thread_count
from twostage.core.machine.precision import reason_for_precision
from twostage.core.machine.progress import ProgressBar
from twostage.core.training.base_run import resolve_precision

ROOT = Path(__file__).parents[1]
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DOMAIN_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT",
             "MPLBACKEND", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "LOCAL_WORLD_SIZE",
             "all_proxy", "ALL_PROXY", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy",
             "NO_PROXY")  # fmt: skip
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
              "--dynamo_backend", "no"]  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def child(words: list[str], folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A real process with only ``variables`` of the `VARIABLES`."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300, check=False)


def says(code: str, **variables: str) -> str:
    ended = child(["-c", code], **variables)
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout.decode().strip()


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["twostage", "stage1_tokenizer", "stage2_prior", "pipelines"])
def test_every_package_limits_spinning_before_torch_is_loaded(package):
    code = f"import os, sys, {package}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    count, torch_is_there = says(code).split()
    assert count.isdecimal()
    assert torch_is_there == "False"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"GOMP_SPINCOUNT": "infinity"}, "infinity"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
        ({"OMP_WAIT_POLICY": "passive"}, "None"),
    ],
)
def test_a_spin_count_that_the_user_set_stays(variables, expected):
    assert says("import os, twostage; print(os.environ.get('GOMP_SPINCOUNT'))", **variables) == expected


@pytest.mark.parametrize(
    "value", ["1", "3", " 3 ", "+3", "03", "3,2", "", "0", "-1", "1.5", "many", "0x1", "1,", "1;2", "3 threads"]
)
def test_thread_counts_are_read_as_openmp_reads_them(value):
    import torch

    places = [Path(torch.__file__).parent / "lib", Path(torch.__file__).parents[1] / "torch.libs"]
    library = next((file for place in places for file in place.glob("libgomp*")), None)
    if library is None:
        pytest.skip("this build of torch has no libgomp")
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).omp_get_max_threads())"
    default = "77"  # libgomp ignores what it cannot read, and uses the number of processors
    assert is_thread_count("OMP_NUM_THREADS", default)
    taken = says(code, OMP_NUM_THREADS=value) != says(code) or value.strip(" +0").split(",")[0] == says(code)
    assert is_thread_count("OMP_NUM_THREADS", value) == taken


@pytest.mark.parametrize(
    ("variables", "launched_with", "threads", "variable"),
    [
        ({}, None, None, None),
        ({"OMP_NUM_THREADS": "1"}, None, "torch", "OMP_NUM_THREADS"),
        ({"MKL_NUM_THREADS": "1"}, None, "torch", "MKL_NUM_THREADS"),
        ({"MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "4"}, None, "torch", "MKL_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "many"}, None, None, None),
        ({"OPENBLAS_NUM_THREADS": "1"}, None, None, None),
        ({"OMP_NUM_THREADS": "1"}, {}, None, None),  # set by the launcher
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"}, {}, "torch", "MKL_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}, "torch", "OMP_NUM_THREADS"),
    ],
)
def test_whether_the_user_set_the_threads(monkeypatch, variables, launched_with, threads, variable):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = None if launched_with is None else Launch(launched_with, None)
    monkeypatch.setattr(processes, "find_launch", lambda: found)
    monkeypatch.setattr(processes, "available_cores", lambda: 6)
    monkeypatch.setattr(processes.torch, "get_num_threads", lambda: 5)
    assert processes.thread_variable() == variable
    assert processes.threads_of(1) == (5 if threads else 6)
    assert processes.threads_of(4) == (5 if threads else 1)


@pytest.mark.parametrize(
    ("multiplications", "variable", "threads", "words"),
    [
        (None, None, 6, "cores available: 6"),
        (1, None, 1, "so small a network"),
        (2 << 27, None, 2, "so small a network"),
        (99 << 27, None, 6, "cores available: 6"),
        (1, "5", 5, "OMP_NUM_THREADS=5"),
    ],
)
def test_the_threads_of_a_training(monkeypatch, multiplications, variable, threads, words):
    chosen: list[int] = []
    monkeypatch.setattr(processes, "find_launch", lambda: None)
    monkeypatch.setattr(processes, "available_cores", lambda: 6)
    monkeypatch.setattr(processes.torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(processes.torch, "set_num_threads", chosen.append)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert_names(processes.choose_threads(multiplications), f"CPU threads: {threads} (", words)
    assert chosen == [threads]


@pytest.mark.parametrize(("limit", "cores"), [(None, 2), (0.5, 1), (1.5, 1), (2.0, 2), (64.0, 2)])
def test_the_limit_of_a_container_counts(monkeypatch, limit, cores):
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(processes, "limit_of_container", lambda: limit)
    assert processes.available_cores() == cores


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
@pytest.mark.parametrize("value", ["many", "0", "-2", "1.5"])
def test_a_number_of_threads_that_makes_no_sense_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with refuses(f"environment variable {name}='{value}'", "expected a number of threads, such as 4", "unset it"):
        processes.share_cores()


@pytest.mark.parametrize(
    ("threads", "local_processes", "busy", "words"),
    [
        (None, "1", 0.3, []),
        (None, "1", 1.9, ["2 threads of this command", "other programs, which use 1.9 cores", "share 2 cores"]),
        ("1", "1", 1.2, []),
        ("1", "1", 1.9, ["1 thread of this command"]),
        ("3", "1", 0.0, ["3 threads of this command share 2 cores"]),
        ("2", "2", 0.0, ["4 threads of this command share 2 cores"]),
        (None, "2", 2.0, []),  # that is the other process of the same command
    ],
)
def test_a_lack_of_cores_is_reported(monkeypatch, threads, local_processes, busy, words):
    monkeypatch.setattr(processes, "find_launch", lambda: None)
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    monkeypatch.setattr(processes, "busy_cores", lambda: busy)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setattr(processes.torch, "get_num_threads", lambda: int(threads))
    found = processes.lack_of_cores(processes.threads_of(int(local_processes)))
    assert (found is None) == (not words)
    assert [word for word in words if word not in (found or "")] == []


def test_busy_cores_are_counted():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        found = [processes.busy_cores() for _ in range(3)]
        other.kill()
    assert 0.4 < max(found) <= processes.available_cores()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python -m pytest", ("", [])),
        ("bash -c 'accelerate launch x'", ("", [])),
        ("accelerate config", ("", [])),
        ("/usr/bin/python3 /opt/bin/accelerate launch --cpu x.py", ("accelerate-launch", ["--cpu", "x.py"])),
        ("accelerate-launch x.py", ("accelerate-launch", ["x.py"])),
        ("python -m accelerate.commands.launch -m a.b", ("accelerate-launch", ["-m", "a.b"])),
        ("python -m accelerate.commands.accelerate_cli launch x.py", ("accelerate-launch", ["x.py"])),
        ("timeout 60 accelerate launch x.py", ("accelerate-launch", ["x.py"])),
        ("python /opt/bin/torchrun --nproc-per-node 2 x.py", ("torchrun", ["--nproc-per-node", "2", "x.py"])),
        ("python -m torch.distributed.run x.py", ("torchrun", ["x.py"])),
        ("python accelerate.commands.launch", ("", [])),
    ],
)
def test_the_command_lines_of_launchers(line, expected):
    import shlex

    assert _command(shlex.split(line)) == expected


THREADS = (
    "import torch; from twostage.core.machine.processes import share_cores; share_cores(); "
    "print('threads', torch.get_num_threads())"
)


@pytest.mark.skipif(processes.available_cores() < 2, reason="needs two cores to distinguish one thread from all")
@pytest.mark.parametrize(
    ("words", "variables", "single"),
    [
        (ACCELERATE, {}, False),
        ([*ACCELERATE, "--num_cpu_threads_per_process", "1"], {}, True),
        (["-m", "torch.distributed.run", "--nproc-per-node", "1"], {"OMP_NUM_THREADS": "1"}, True),
    ],
)
def test_a_thread_count_set_by_the_launcher_does_not_count(tmp_path, words, variables, single):
    script = tmp_path / "script.py"
    script.write_text(THREADS)
    ended = child([*words, str(script)], **variables)
    assert ended.returncode == 0, ended.stderr.decode()
    threads = int(ended.stdout.decode().split("threads ")[1].split()[0])
    assert (threads == 1) == single


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"cpu_name": "Intel Xeon", "amx_tile": True, "amx_bf16": True, "avx512_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "amx_tile": True, "amx_bf16": False, "avx512_bf16": False}, "no"),
        ({"cpu_name": "Intel Xeon", "amx_tile": False, "amx_bf16": False, "avx512_bf16": True}, "no"),
        ({"cpu_name": "AMD EPYC 9354", "amx_tile": False, "avx512_bf16": True}, "bf16"),
        ({"cpu_name": "AMD EPYC 7763", "amx_tile": False, "avx512_bf16": False}, "no"),
        ({"cpu_name": "Neoverse V1", "architecture": "aarch64", "bf16": True}, "no"),
        ({}, "no"),
    ],
)
def test_auto_follows_from_the_processor(monkeypatch, processor, expected):
    torch = precision.torch
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert {reason_for_precision(torch.device("cpu"))[0] for _ in range(20)} == {expected}


@pytest.mark.parametrize(("backbone", "expected"), [("mlp", "no"), ("conv", "bf16"), ("vqgan", "bf16")])
def test_auto_follows_from_the_network_too(monkeypatch, backbone, expected):
    monkeypatch.setattr(precision.torch.cpu, "get_capabilities", lambda: {"amx_tile": True, "amx_bf16": True})
    document = {"run": {"dir": "x"}, "train": {"max_steps": 1, "mixed_precision": "auto"}}
    config = parse_config(TokenizerConfig, document | {"model": {"backbone": {"type": backbone}}}, "config")
    assert resolve_precision(config, PartialState(cpu=True), False).train.mixed_precision == expected
    resumed = resolve_precision(config, PartialState(cpu=True), False, {"train": {"mixed_precision": "bf16"}})
    assert resumed.train.mixed_precision == "bf16", "a run keeps the precision that it was started with"


def test_auto_needs_onednn(monkeypatch):
    torch = precision.torch
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert reason_for_precision(torch.device("cpu"))[0] == "no"


# --- launches, trackers -----------------------------------------------------------------------------------------------


def metrics(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text()


def test_the_configuration_overrides_variables_of_accelerate(twostage, configs, tmp_path, monkeypatch):
    words = ["train-tokenizer", configs / "tokenizer.yaml", "train.max_steps=4", "train.gradient_accumulation_steps=2"]
    plain = twostage(*words, f"run.dir={tmp_path / 'plain'}")
    assert "the launch option" not in plain.out
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    overruled = twostage(*words, f"run.dir={tmp_path / 'overruled'}")
    assert overruled.code == 0, overruled.err
    assert metrics(tmp_path / "overruled") == metrics(tmp_path / "plain")
    lines = [line for line in overruled.out.splitlines() if "the launch option" in line]
    assert len(lines) == 2
    assert_names(lines[0], "mixed_precision=bf16", "train.mixed_precision is no")
    assert_names(lines[1], "gradient_accumulation_steps=4", "train.gradient_accumulation_steps is 2")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "no", 0),  # the launcher sets it on its own
        ("ACCELERATE_MIXED_PRECISION", "", 0),
        ("ACCELERATE_MIXED_PRECISION", "bf16", 0),  # the same as in the configuration
        ("ACCELERATE_MIXED_PRECISION", "fp8", 1),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", 0),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", 1),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "many", 1),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", 0),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", 1),
        ("ACCELERATE_DYNAMO_BACKEND", "nonsense", 1),
    ],
)
def test_notices_about_a_launch(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "find_launch", lambda: None)
    assert len(launch.overruled("bf16", 2)) == said


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_deepspeed_and_others_are_refused(twostage, configs, tmp_path, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert f"does not support {kind}" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_DEBUG_MODE"])
@pytest.mark.parametrize("value", ["maybe", ""])
def test_a_flag_that_is_neither_true_nor_false(twostage, configs, tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    ended = twostage("train-tokenizer", configs / "tokenizer.yaml", f"run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert f"{name}={value!r}: expected true or false" in ended.err


def test_a_tracker_that_is_not_installed_is_refused(twostage, configs, tmp_path):
    words = ["train-tokenizer", configs / "tokenizer.yaml", f"run.dir={tmp_path / 'run'}"]
    ended = twostage(*words, "run.trackers=[wandb, tensorboard]")
    assert ended.code == 2
    assert "run.trackers wandb: wandb is not installed" in ended.err
    assert "run.trackers=[tensorboard]" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_prevents_the_run(configs, tmp_path):
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def init(**_): raise RuntimeError('No API key\\nconfigured')\n")
    information = tmp_path / "packages" / "wandb-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 1.0\n")
    words = ["-m", "pipelines.cli", "train-tokenizer", str(configs / "tokenizer.yaml"), "run.dir=run"]
    path = os.pathsep.join([str(ROOT), str(package.parent)])
    ended = child([*words, "run.trackers=[wandb]"], tmp_path, PYTHONPATH=path)
    said = ended.stderr.decode()
    assert ended.returncode == 2, said
    assert "run.trackers wandb: could not be started (No API key configured)" in said
    assert "Traceback" not in said


# --- everything at once, under a launcher -----------------------------------------------------------------------------


def test_a_launch_in_a_strange_environment(tmp_path, configs):
    """A notebook's backend, an unusable proxy, a terminal with few characters, classes in other scripts."""
    for label, name in enumerate(["猫", "собака", "größe", "قطة"]):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new("L", (16, 16), 40 * label + number).save(folder / f"{number}.png")
    document = yaml.safe_load((configs / "tokenizer.yaml").read_text())
    document["run"] |= {"dir": "run-猫"}
    document["data"] = {"source": "data", "image_size": 16, "channels": 1}
    document["model"]["bottleneck"] = {"type": "class_gaussian"}
    document["train"] |= {"batch_size": 8, "max_steps": 4, "log_every": 2, "validate_every": 2, "checkpoint_every": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    options = ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "4"]
    words = [*ACCELERATE, *options, "-m", "stage1_tokenizer.train_tokenizer", "config.yaml"]
    ended = child(
        words,
        tmp_path,
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        ALL_PROXY="socks5://127.0.0.1:1",
        PYTHONIOENCODING="latin-1",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="3",
    )
    said = (ended.stdout + ended.stderr).decode("latin-1")
    assert ended.returncode == 0, said
    assert "Traceback" not in said
    assert_names(said, "launch option mixed_precision=bf16", "launch option gradient_accumulation_steps=4")
    assert "run-\\u732b" in said
    assert b"\r" not in ended.stdout + ended.stderr
    assert sum(line.startswith("step ") and "/4: " in line for line in said.splitlines()) == 2
    assert (tmp_path / "run-猫" / "losses.png").is_file()


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1:strict", "MPLBACKEND": "nonsense"},
    ],
)
def test_a_terminal_with_few_characters(tmp_path, variables):
    code = (
        "from twostage.core.machine.command import run_command\nfrom twostage.core.errors import InputError\n"
        "def command() -> None:\n    '''猫 …'''\n    print('猫 \\ud800'); raise InputError('нет')\n"
        "run_command(command)"
    )
    (tmp_path / "command.py").write_text(code, encoding="utf-8")
    ended = child(["command.py"], tmp_path, **variables)
    assert ended.returncode == 2
    assert ended.stdout == b"\\u732b \\ud800\n"
    assert ended.stderr == b"error: \\u043d\\u0435\\u0442\n"


@pytest.mark.parametrize(
    ("backend", "kept"),
    [
        ("module://ipympl.backend_nbagg", False),
        ("nonsense", False),
        ("svg", True),
        ("Qt5Agg", True),
        ("module://os", True),
        ("", False),
    ],
)
def test_any_matplotlib_backend(backend, kept):
    code = """
import os
from twostage.core.images.fonts import load_matplotlib
matplotlib = load_matplotlib()
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
FigureCanvasAgg(Figure()).draw()
print(os.environ["MPLBACKEND"] + "|" + str(matplotlib.rcParams._get("backend")))
"""
    asked, backend_there = says(code, MPLBACKEND=backend).split("|")
    assert asked == backend, "the user's variable does not change"
    assert (backend_there.lower() == backend.lower()) == kept


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_only_drawn_on_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    seen = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with ProgressBar(total=3, desc="part", mininterval=0) as bar:
            for _ in range(3):
                bar.update()
        seen[type(stream)] = stream.getvalue()
    assert "\r" in seen[Terminal]
    lines = seen[io.StringIO].splitlines()
    assert "\r" not in seen[io.StringIO]
    assert lines
    assert all(line.startswith("part: ") and " left" in line for line in lines)


def test_short_work_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(ProgressBar(range(5), desc="part", leave=False)) == [0, 1, 2, 3, 4]
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_log_has_one_line_per_log_every(twostage, configs, tmp_path):
    words = ["train-tokenizer", configs / "tokenizer.yaml", f"run.dir={tmp_path / 'run'}", "train.log_every=5"]
    ended = twostage(*words, "train.max_steps=20", "train.validate_every=20", "train.checkpoint_every=20")
    assert ended.code == 0
    assert "\r" not in ended.out + ended.err
    lines = [line for line in ended.out.splitlines() if line.startswith("step ") and "/20: " in line]
    assert [line.split("/")[0] for line in lines] == ["step 5", "step 10", "step 15", "step 20"]
    assert all("loss " in line and "img/s" in line and " left" in line for line in lines)


# --- proxies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("http_proxy", "", None),
        ("http_proxy", "http://proxy:3128", None),
        ("HTTPS_PROXY", "https://user:secret@proxy:3128", None),
        ("https_proxy", "proxy:3128", None),
        ("ALL_PROXY", "socks5://127.0.0.1:1080", "SOCKS"),
        ("all_proxy", "socks5h://user:secret@proxy:1", "SOCKS"),
        ("all_proxy", "socks4://proxy:1", "expected http://HOST:PORT"),
        ("http_proxy", "foo://user:secret@proxy", "expected http://HOST:PORT"),
        ("https_proxy", "http://proxy:secret", "expected http://HOST:PORT"),
        ("https_proxy", "::::", "expected http://HOST:PORT"),
        ("no_proxy", "::::", "expected http://HOST:PORT"),
    ],
)
def test_unusable_proxies(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    found = broken_proxy()
    if expected is None or (expected == "SOCKS" and found is None):  # httpx[socks] may be installed
        assert found is None
        return
    assert found is not None
    assert found.startswith(f"{name.lower()}: ")
    assert expected in found
    assert "secret" not in found


def test_the_page_starts_behind_an_unusable_proxy(runs, tmp_path):
    pytest.importorskip("gradio")
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "ALL_PROXY": "foo://proxy", "no_proxy": "::::", "MPLBACKEND": "nonsense"}
    words = [sys.executable, "-m", "pipelines.app", str(runs.prior), "--port", "7917"]
    with subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        line = server.stdout.readline().decode()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert line.startswith("http://127.0.0.1:7917/ shows")
