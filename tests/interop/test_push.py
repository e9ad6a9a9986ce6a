"""Pushing to a model hub: against one that listens on this machine only."""

import base64
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from forks import COMMAND, Fork
from stablefield.cli.entry import main


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
        if self.path == "/api/models/ada/digits":
            return self.answer(200, {"id": "ada/digits", "private": not self.server.public})
        return self.answer(404, {"error": f"no {self.path} here"})

    def answer(self, code: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.told, server.refusing, server.public = [], False, False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def export(
    run: Path, tmp_path: Path, hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, fork: Callable[..., Fork]
) -> Fork:
    """The export of a run into the folder pipe, which is over."""
    # The client reads its environment when it is imported, so the command gets a process of its own.
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_of_the_test",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    flags = ["--out", tmp_path / "pipe", "--samples", "4", "--steps", "2", "--push", "ada/digits", "--private"]
    done = fork(COMMAND, "export", run, *flags, **environment)
    done.wait()
    return done


@pytest.fixture
def public(hub: ThreadingHTTPServer) -> None:
    hub.public = True


@pytest.fixture
def refusing(hub: ThreadingHTTPServer) -> None:
    hub.refusing = True


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    flags = ["--steps", "2", "--network.width", "16", "--network.depth", "1", "--sample-every", "0"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", "digits", *flags, "--out", str(path)])
    return path


def test_every_file_of_an_export_arrives_at_the_hub_in_one_commit(export: Fork, hub, tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    assert export.returncode == 0, export.stderr[-2000:]
    assert export.stdout.strip().endswith("/ada/digits/commit/" + "0" * 40)
    told = {path: (who, body) for path, who, body in hub.told}
    made = json.loads(told["/api/repos/create"][1])
    assert (made["organization"], made["name"], made["visibility"]) == ("ada", "digits", "private")
    for path in ("/api/repos/create", "/api/models/ada/digits/commit/main"):
        assert told[path][0] == "Bearer hf_of_the_test"
    commit = [json.loads(line) for line in told["/api/models/ada/digits/commit/main"][1].splitlines()]
    files = {line["value"]["path"]: line["value"]["content"] for line in commit if line["key"] == "file"}
    expected = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "model_index.json", "samples.png", "unet/network.py"} <= set(expected)
    assert {path: base64.b64decode(content) for path, content in files.items()} == expected


@pytest.mark.usefixtures("refusing")
def test_hub_that_refuses_is_a_failure_with_its_reason_and_the_export_stays(export: Fork, tmp_path: Path) -> None:
    assert export.returncode == 1
    assert "--push ada/digits failed; the export remains in its folder: 403" in export.stderr
    assert "You may not write here." in export.stderr
    assert "\n" not in export.stderr.strip()
    assert "Traceback" not in export.stderr
    assert (tmp_path / "pipe" / "README.md").is_file()


@pytest.mark.usefixtures("public")
def test_nothing_is_uploaded_to_a_public_repository_that_was_to_be_private(export: Fork, hub) -> None:
    assert export.returncode == 1
    assert "--push ada/digits failed" in export.stderr
    assert "the repository exists and is public: make it private on the hub" in export.stderr
    assert not any("commit" in path or "preupload" in path for path, *_ in hub.told)
