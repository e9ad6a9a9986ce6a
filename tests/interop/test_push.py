"""Pushing to a model hub: against one that listens on this machine only."""

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

import stablefield


class Hub(BaseHTTPRequestHandler):
    """The few requests of an upload, kept in `server.told`; files arrive in the commit."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        base = f"http://127.0.0.1:{self.server.server_port}"
        self.server.told.append((self.path, self.headers.get("Authorization"), body))
        if self.server.refusing:
            return self.answer(403, {"error": "You may not write here."})
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{base}/ada/digits"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/models/ada/digits/preupload/main":
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.answer(200, {"files": files})
        if self.path == "/api/models/ada/digits/commit/main":
            url = f"{base}/ada/digits/commit/{'0' * 40}"
            return self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})
        return self.answer(404, {"error": f"no {self.path} here"})

    def do_GET(self) -> None:
        self.server.told.append((self.path, self.headers.get("Authorization"), b""))
        self.answer(404, {"error": f"no {self.path} here"})

    def answer(self, code: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.told, server.refusing = [], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(folder: Path, hub: ThreadingHTTPServer, cache: Path) -> subprocess.CompletedProcess[str]:
    # The client reads its environment when it is imported, so it gets a process of its own.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {
        **kept,
        "PYTHONPATH": str(Path(stablefield.__file__).parents[1]),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_of_the_test",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    code = f"""
import pathlib
from stablefield.interop.hub import push_folder
print(push_folder(pathlib.Path({str(folder)!r}), "ada/digits", private=True))
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    (path / "unet").mkdir(parents=True)
    (path / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# digits\n")
    (path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(range(256)))
    return path


def test_every_file_of_the_folder_arrives_at_the_hub_in_one_commit(folder: Path, hub, tmp_path: Path) -> None:
    done = push(folder, hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("/ada/digits/commit/" + "0" * 40)
    told = {path: (who, body) for path, who, body in hub.told}
    made = json.loads(told["/api/repos/create"][1])
    assert (made["organization"], made["name"], made["visibility"]) == ("ada", "digits", "private")
    for path in ("/api/repos/create", "/api/models/ada/digits/commit/main"):
        assert told[path][0] == "Bearer hf_of_the_test"
    commit = [json.loads(line) for line in told["/api/models/ada/digits/commit/main"][1].splitlines()]
    files = {line["value"]["path"]: line["value"]["content"] for line in commit if line["key"] == "file"}
    expected = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: base64.b64decode(content) for path, content in files.items()} == expected


def test_hub_that_refuses_is_an_error_with_its_reason(folder: Path, hub, tmp_path: Path) -> None:
    hub.refusing = True
    done = push(folder, hub, tmp_path / "cache")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    assert any("403" in line for line in last)
    assert any("You may not write here." in line for line in last)
