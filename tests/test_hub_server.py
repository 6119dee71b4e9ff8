"""The loopback Hub itself, and the `hf` command against it: what it stores, checks and refuses."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hub_routes import Account
from hub_server import Fault
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def api(hub):
    hub.tokens["secret"] = Account("ada", {"ada": "write", "lab": "read"})
    return HfApi(token="secret")


def ask(hub, method, path, body=b"", **headers):
    """(status, headers, body) of a request made by hand."""
    with closing(http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)) as connection:
        connection.request(method, path, body, headers)
        with connection.getresponse() as response:
            return response.status, dict(response.headers), response.read()


def test_content_is_stored_once_under_its_hash(hub, api):
    api.create_repo("ada/a")
    for name in ("one.bin", "two.bin"):
        api.upload_file(path_or_fileobj=b"\0" * 999, path_in_repo=name, repo_id="ada/a")
    api.upload_file(path_or_fileobj=b"text", path_in_repo="a.txt", repo_id="ada/a")
    sha256 = hashlib.sha256(b"\0" * 999).hexdigest()
    assert hub.objects[sha256] == b"\0" * 999
    assert hub.objects[hashlib.sha1(b"blob 4\0text").hexdigest()] == b"text"  # git's name of a file
    assert len(hub.asked("PUT", "/lfs/")) == 1
    assert len(hub.objects) == 3  # with .gitattributes
    info = api.model_info("ada/a", files_metadata=True)
    assert {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs} == {
        "one.bin": sha256,
        "two.bin": sha256,
    }


def test_lfs_bytes_that_do_not_fit_their_hash_are_refused(hub):
    oid = hashlib.sha256(b"right").hexdigest()
    status, headers, _ = ask(hub, "PUT", f"/lfs/{oid}", b"wrong")
    assert (status, hub.objects) == (400, {})
    assert headers["X-Error-Message"].startswith(f"sha256 must be {oid}, got")
    assert ask(hub, "PUT", f"/lfs/{oid}", b"right")[0] == 200
    assert hub.objects == {oid: b"right"}
    assert ask(hub, "POST", f"/lfs/{oid}/verify", json.dumps({"oid": oid, "size": 4}))[0] == 404


def test_a_commit_of_a_file_that_was_not_uploaded_is_refused(hub, api):
    api.create_repo("ada/a")
    before = hub.repositories["ada/a"].branches["main"]
    value = {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": value}]
    body = "\n".join(map(json.dumps, lines))
    path = "/api/models/ada/a/commit/main"
    assert ask(hub, "POST", path, body, Authorization="Bearer secret")[0] == 400
    assert hub.repositories["ada/a"].branches["main"] == before


@pytest.mark.parametrize(
    ("token", "repo", "read", "write"),
    [
        (None, "ada/open", 200, 401),
        (None, "ada/closed", 401, 401),
        ("wrong", "ada/open", 401, 401),
        ("reader", "ada/closed", 200, 403),
        ("stranger", "ada/open", 200, 403),
        ("stranger", "ada/closed", 404, 404),
        ("secret", "ada/closed", 200, 200),
        ("secret", "ada/none", 404, 404),
    ],
)
def test_tokens_give_the_rights_of_their_roles(hub, api, token, repo, read, write):
    hub.tokens |= {"reader": Account("eve", {"ada": "read"}), "stranger": Account("bob", {"bob": "write"})}
    hub.put("ada/open", {"config.json": b"{}"})
    hub.put("ada/closed", {"config.json": b"{}"}, private=True)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    assert ask(hub, "GET", f"/{repo}/resolve/main/config.json", **headers)[0] == read
    body = json.dumps({"tag": "v1"})
    assert ask(hub, "POST", f"/api/models/{repo}/tag/main", body, **headers)[0] == write


def test_revisions_are_branches_tags_commits_and_requests(hub, api):
    first = hub.put("ada/a", {"x": b"1"}).sha
    api.create_tag("ada/a", tag="v1")
    api.create_branch("ada/a", branch="next")
    hub.put("ada/a", {"x": b"2"})
    api.upload_file(path_or_fileobj=b"3", path_in_repo="x", repo_id="ada/a", create_pr=True)
    for revision, content in (
        ("main", b"2"),
        ("next", b"1"),
        ("v1", b"1"),
        (first, b"1"),
        ("refs/pr/1", b"3"),
    ):
        path = api.hf_hub_download("ada/a", "x", revision=revision)
        assert Path(path).read_bytes() == content, revision
    refs = api.list_repo_refs("ada/a")
    assert [tag.name for tag in refs.tags] == ["v1"]
    assert len(api.list_repo_commits("ada/a")) == 2
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("ada/a", tag="v1")


def test_a_range_is_served_from_where_it_begins(hub):
    hub.put("ada/a", {"x.bin": b"0123456789"})
    status, headers, body = ask(hub, "GET", "/ada/a/resolve/main/x.bin", Range="bytes=7-")
    assert (status, headers["Content-Range"], body) == (206, "bytes 7-9/10", b"789")


def test_faults_happen_as_often_as_asked_and_in_place(hub):
    hub.put("ada/a", {"x.bin": b"0123456789"})
    path = "/ada/a/resolve/main/x.bin"
    hub.faults += [Fault("GET", "x.bin", status=503, times=2), Fault("GET", "x.bin", damage=True)]
    assert [ask(hub, "GET", path)[0] for _ in "12"] == [503, 503]
    assert ask(hub, "GET", path)[2] == b"012345678" + bytes([ord("9") ^ 0xFF])
    hub.faults.append(Fault("GET", "x.bin", cut=4))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(hub, "GET", path)
    assert caught.value.partial == b"0123"
    assert ask(hub, "GET", path)[2] == b"0123456789"
    assert [request.status for request in hub.requests] == [503, 503, 200, 200, 200]


def test_an_unknown_route_is_answered_and_kept(hub):
    assert ask(hub, "GET", "/api/spaces/ada/a")[0] == 404
    assert hub.unknown == ["GET /api/spaces/ada/a"]
    hub.unknown.clear()


def hf(*arguments, code=0):
    """What the `hf` command prints."""
    command = Path(sys.executable).with_name("hf")
    done = subprocess.run([command, *arguments], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_hf_command_pushes_lists_pulls_and_pins(hub, api, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "x.safetensors").write_bytes(b"1" * 500)
    assert "ada" in hf("auth", "whoami")
    hf("upload", "ada/a", str(folder))
    hf("repos", "tag", "create", "ada/a", "v1")
    hub.put("ada/a", {"x.safetensors": b"2" * 500})
    assert "x.safetensors" in hf("models", "ls", "ada/a")
    hub.faults.append(Fault("GET", "x.safetensors", cut=100))
    hf("download", "ada/a", "--local-dir", str(out))
    assert (out / "x.safetensors").read_bytes() == b"2" * 500
    pinned = hf("download", "ada/a", "x.safetensors", "--revision", "v1", "--quiet").splitlines()[-1]
    assert Path(pinned.removeprefix("path=").strip()).read_bytes() == b"1" * 500
    assert "ada/none" in hf("download", "ada/none", code=1)
