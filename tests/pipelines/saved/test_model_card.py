"""A model card shows what is known and invents nothing; a push uploads the folder."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from messages import assert_names, refuses

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.saved.model_card import CardFields, gather_records, is_as_written
from pipelines.saved.saved_model import SavedModel
from twostage.core.files import file_sha256

NEEDS_NO_NETWORK = {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "no_proxy": "*"}


def card_of(pipeline: TwoStagePipeline, folder: Path, records: dict[str, bytes], fields: CardFields) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.write_card(folder, records, fields)
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def evaluation(run: Path, **figures: float) -> bytes:
    document = {
        "figures": {"psnr": 21.25, "ssim": None} | figures,
        "protocol": {
            "tokenizer": {"weights_sha256": file_sha256(run / "model" / "model.safetensors")},
            "data": {"source": "shapes", "split": "test", "images": 64, "chosen": "all", "sha256": "f" * 64},
            "not_measured": {"ssim": "not finite"},
        },
    }
    return json.dumps(document).encode()


def test_unknown_facts_are_not_shown(pipeline, runs, tmp_path):
    card = card_of(pipeline, tmp_path, {}, CardFields())
    head = front_matter(card)
    assert head["library_name"] == "twostage"
    assert {"image-generation", "vector-quantization"} < set(head["tags"])
    assert "license" not in head
    assert "datasets" not in head
    assert_names(card, "`twostage evaluate runs/TOKENIZER`", "`twostage evaluate runs/PRIOR`")
    assert_names(card, "not recorded", "License of the data: not stated")
    assert pipeline.tokenizer.content_hash() in card
    assert (tmp_path / "samples.png").is_file()


def test_known_facts_are_shown(pipeline, runs, tmp_path):
    records = gather_records(SavedModel.find(runs.prior))
    assert set(records) == {"training/tokenizer.yaml", "training/prior.yaml"}
    records["evaluation/tokenizer.json"] = evaluation(runs.tokenizer)
    training = yaml.safe_load(records["training/tokenizer.yaml"])
    training["data"]["source"] = "ylecun/mnist"
    records["training/tokenizer.yaml"] = yaml.safe_dump(training).encode()
    card = card_of(pipeline, tmp_path, records, CardFields("mit", "CC BY-SA 3.0", "me/mine"))
    assert front_matter(card)["license"] == "mit"
    assert front_matter(card)["datasets"] == ["ylecun/mnist"]
    assert "| PSNR | 21.25 dB |" in card
    assert "SSIM" not in card
    assert "`test`: 64 images (all), sha256 `ffffffffffff`" in card
    assert "Trained on `ylecun/mnist`. License of the data: CC BY-SA 3.0." in card
    assert 'from_pretrained("me/mine")' in card
    for name in records:
        assert f"[{name}]({name})" in card
        assert (tmp_path / name).is_file()


def test_figures_of_other_weights_are_omitted(runs, changed_tokenizer):
    run = changed_tokenizer("decoder")
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "evaluation.json").write_bytes(evaluation(run))
    (run / "evaluation" / "typical.png").write_bytes(b"image")
    records = gather_records(SavedModel.find(runs.prior), run)
    assert {"evaluation/tokenizer.json", "reconstructions.png"} < set(records)
    (run / "evaluation" / "evaluation.json").write_bytes(evaluation(runs.tokenizer))
    assert set(gather_records(SavedModel.find(runs.prior), run)) == {"training/tokenizer.yaml", "training/prior.yaml"}


def test_the_example_in_the_card_runs(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "shared")
    card = card_of(pipeline, tmp_path / "shared", {}, CardFields(where=str(tmp_path / "shared")))
    code = card.split("```python\n")[1].split("```")[0].replace('"image.png"', repr(str(tmp_path / "image.png")))
    exec(code, {})
    assert (tmp_path / "image.png").is_file()


def test_edits_by_hand_are_detected(pipeline, tmp_path):
    card = card_of(pipeline, tmp_path, {}, CardFields())
    assert is_as_written(card)
    assert not is_as_written(card.replace("not stated", "public domain"))
    assert not is_as_written("# My own")


# --- the hub --------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub that an upload needs; keeps what it receives."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._answer({"error": "no"}, 401)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"http://{self.headers['Host']}/me/mine"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/me/mine/commit/0"
            return self._answer({"commitUrl": address, "commitOid": "0" * 40, "success": True})
        return self._answer({}, 404)

    def do_GET(self) -> None:
        self._answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True})

    def _answer(self, document: dict, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PUSH = """
import sys
from pipelines.drawing.two_stage import TwoStagePipeline
print(TwoStagePipeline.from_pretrained(sys.argv[1]).push_to_hub("me/mine", private=True, license="mit"))
"""


def test_push_to_a_hub(pipeline, hub, tmp_path):
    """In its own process: the hub's library reads its address only once."""
    pipeline.save_pretrained(tmp_path / "shared")
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = os.environ | NEEDS_NO_NETWORK | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}

    def push(token: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", PUSH, str(tmp_path / "shared")]
        return subprocess.run(words, env=environment | {"HF_TOKEN": token}, capture_output=True, text=True, check=False)

    done = push("hf_right")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{address}/me/mine"
    assert hub.created[0]["name"] == "mine"
    assert "private" in (
        hub.created[0].get("visibility"),
        *[key for key, value in hub.created[0].items() if value is True],
    )
    folder = tmp_path / "arrived"
    for name, content in hub.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    arrived = TwoStagePipeline.from_pretrained(folder)
    assert arrived.tokenizer.content_hash() == pipeline.tokenizer.content_hash()
    assert front_matter((folder / "README.md").read_text())["license"] == "mit"
    assert 'from_pretrained("me/mine")' in (folder / "README.md").read_text()
    assert (folder / "samples.png").is_file()
    refused = push("hf_wrong")
    assert_names(refused.stderr.splitlines()[-1], "me/mine", "hf auth login")


def test_push_without_a_network(pipeline, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refuses("me/mine", "hf auth login"):
        pipeline.push_to_hub("me/mine")
