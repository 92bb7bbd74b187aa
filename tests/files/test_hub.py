"""Pushing to the hub, against one of our own on loopback."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from pujax.errors import ConfigError
from pujax.files.hub import require_hub

PUSH = """
import sys
from pathlib import Path
from pujax.errors import ConfigError
from pujax.files.hub import push
try:
    print(push("me/mine", {"config.json": Path(sys.argv[1]), "README.md": b"card"}))
except ConfigError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """Takes what is committed; refuses to make models for another token than `right`."""

    made: ClassVar[list] = []
    files: ClassVar[dict] = {}

    def do_POST(self):
        host = self.headers["Host"]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            Hub.made.append(json.loads(body))
            self.answer({"url": f"http://{host}/me/mine", "id": "me/mine"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/me/mine/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            kind = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer({"files": [{"path": path} | kind for path in paths]})
        elif self.path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    Hub.files[line["value"]["path"]] = content
            url = f"http://{host}/me/mine/commit/abc"
            self.answer({"success": True, "commitOid": "abc", "commitUrl": url})
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def answer(self, content, status=200):
        told = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Hub.made, Hub.files = [], {}
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("token", ["right", "wrong", "nobody listens"])
def test_files_are_pushed_as_one_commit_of_a_private_model(hub, token, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    asked = {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    if token == "nobody listens":
        asked["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(tmp_path / "config.json")],
        capture_output=True,
        text=True,
        env=os.environ | asked,
    )
    assert done.returncode == 0, done.stderr
    if token != "right":
        assert done.stdout.startswith("push=me/mine: the hub did not take it (")
        assert token not in done.stdout
        assert done.stdout.count("\n") == 1
        return
    assert done.stdout == f"{hub}/me/mine\n"
    assert [(made["name"], made["visibility"]) for made in Hub.made] == [("mine", "private")]
    assert Hub.files == {"config.json": b"{}", "README.md": b"card"}


def test_a_name_that_is_none_and_a_missing_token_are_refused_before_anything(monkeypatch):
    with pytest.raises(ConfigError, match="write OWNER/NAME"):
        require_hub("mine")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        require_hub("me/mine")
