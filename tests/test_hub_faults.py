"""What goes wrong between us and the Hub: one clear line each, nothing lost, nothing half, nothing run."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_client import REPO, TINY, WEIGHTS, cached, refused, same
from hub_server import Fault
from huggingface_hub import HfApi, constants, file_download

from sagan_kernels.models import Discriminator, Generator

pytestmark = [
    pytest.mark.usefixtures("ada"),
    # the client's own upload of LFS files calls its HTTP library in a deprecated way
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("args", "options", "kind", "match"),
    [
        (["ada/none"], {}, FileNotFoundError, "'ada/none' must be a folder here or a repository on the Hub"),
        ([REPO], {"revision": "v9"}, FileNotFoundError, "branch, tag or commit of ada/tiny, got 'v9'"),
        ([REPO], {"revision": "0" * 40}, FileNotFoundError, "branch, tag or commit of ada/tiny, got '0000"),
        ([REPO], {"token": "wrong"}, PermissionError, "with a valid token, got 'Invalid cred.*`hf auth login`"),
        (["a--b/c"], {}, ValueError, "must be named namespace/name, got 'a--b/c'"),
        ([Path("ada/tiny")], {}, ValueError, "must be a zoo entry or a model folder, got 'ada/tiny'"),
        (["./ada/tiny"], {}, ValueError, "must be a zoo entry or a model folder, got 'ada/tiny'"),
        (["ada/../tiny"], {}, ValueError, "must be a zoo entry or a model folder"),
        (["ada/.."], {}, ValueError, "must be a zoo entry or a model folder"),
        ([REPO], {"subfolder": "../x"}, ValueError, r"subfolder must be a relative name without '\.\.'"),
        ([REPO], {"subfolder": "/etc"}, ValueError, "subfolder must be a relative name"),
        ([REPO], {"revision": "../../../x"}, ValueError, "revision must be a relative name"),
        (["sagan_32_fashion"], {"revision": "v1"}, ValueError, "revision must be left out for 'sagan_32_fashion'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_there_is_told_in_one_line(pushed, args, options, kind, match):
    """Trap 2: the stock mixin answers each with a TypeError about a missing argument."""
    refused(kind, match, *args, **options)
    assert not cached()


def test_a_missing_part_is_told_with_what_is_there(hub, generator):
    generator.push_to_hub(REPO)
    refused(
        FileNotFoundError,
        r"ada/tiny must hold discriminator\.safetensors, got README\.md, config\.json, generator\.safetensors",
        cls=Discriminator,
    )


def test_a_repository_of_another_library_is_refused_before_its_weights_are_fetched(hub):
    hub.put(REPO, {"config.json": b'{"library_name": "diffusers"}', "generator.safetensors": b"x" * 100})
    refused(ValueError, r"config\.json: library_name must be 'sagan-kernels', got 'diffusers'")
    hub.put(REPO, {"config.json": b'{"format_version": 9, "library_name": "sagan-kernels", "sha256": {}}'})
    refused(ValueError, "format_version must be at most 1, got 9")
    assert not hub.asked("GET", WEIGHTS)


def test_a_push_over_another_librarys_model_is_refused(hub, generator):
    hub.put(REPO, {"config.json": b'{"library_name": "diffusers"}'})
    before = hub.repositories[REPO].branches["main"]
    with pytest.raises(ValueError, match="library_name must be 'sagan-kernels', got 'diffusers'"):
        generator.push_to_hub(REPO)
    assert hub.repositories[REPO].branches["main"] == before


class Exploit:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


def test_a_repository_of_pickles_is_refused_and_runs_no_code(hub, generator, tmp_path):
    """Trap 8: the stock mixin falls back to pytorch_model.bin."""
    payload = pickle.dumps(Exploit())
    hub.put(REPO, {"pytorch_model.bin": payload})
    refused(
        FileNotFoundError, r"got pytorch_model\.bin, a pickle, refused because loading one can run any code"
    )
    config = (generator.save_pretrained(tmp_path / "out") / "config.json").read_bytes()
    hub.put(REPO, {"config.json": config, "generator.pkl": payload})
    refused(FileNotFoundError, r"must hold generator\.safetensors, got generator\.pkl, a pickle, refused")
    named = json.loads(config)
    named["sha256"]["generator.safetensors"] = hashlib.sha256(payload).hexdigest()
    hub.put("ada/masked", {"config.json": json.dumps(named).encode(), "generator.safetensors": payload})
    refused(ValueError, "must be a safetensors file", "ada/masked")
    assert not hub.asked("GET", r"pytorch_model\.bin|generator\.pkl")
    assert not Path("exploited").exists()
    pickle.loads(payload)
    assert Path("exploited").exists()  # the payload would have worked


def test_names_that_lead_out_of_a_repository_write_nothing_outside_the_cache(pushed, tmp_path):
    evil = {"../../../../evil.safetensors": b"x", "/etc/evil": b"x", "a/../../evil": b"x", "..\\evil": b"x"}
    pushed.put(REPO, evil)
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache")}
    Generator.from_pretrained(REPO)
    with pytest.raises(ValueError, match="Invalid filename"):
        HfApi().snapshot_download(REPO)
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache")}
    assert after == before
    assert not [path for path in cached() if not path.resolve().is_relative_to(tmp_path / "cache")]


def test_tampered_weights_are_refused_and_fetched_again_on_demand(pushed, generator):
    pushed.faults.append(Fault("GET", WEIGHTS, damage=True))
    refused(ValueError, r"sha256 must be config\.json's .*truncated or altered.*force_download=True")
    refused(ValueError, "truncated or altered")
    assert same(Generator.from_pretrained(REPO, force_download=True), generator)
    assert same(Generator.from_pretrained(REPO), generator)


def test_an_upload_of_other_bytes_is_refused_by_the_hub_and_the_repository_stays(pushed, generator):
    before = pushed.repositories[REPO].branches["main"]
    pushed.faults.append(
        Fault("PUT", "/lfs/", status=400, headers={"X-Error-Message": "sha256 must be other"})
    )
    with torch.no_grad():
        generator.norm.bias += 1
    with pytest.raises(
        ConnectionError, match="ada/tiny at main must be served, got 400: sha256 must be other"
    ):
        generator.push_to_hub(REPO)
    assert pushed.repositories[REPO].branches["main"] == before


@pytest.mark.parametrize("where", ["config", "safetensors"])
@pytest.mark.parametrize(
    ("status", "kind", "match"),
    [
        (401, PermissionError, "valid token"),
        (403, PermissionError, "must be open to your token, got 'injected 403'"),
        (429, ConnectionError, "asked for less often, got 429 from the Hub; wait and try again"),
        (500, ConnectionError, "must be served, got 500 from the Hub; try again later"),
    ],
)
def test_a_hub_that_refuses_is_told_and_the_next_try_succeeds(pushed, generator, where, status, kind, match):
    pushed.faults += [
        Fault(method, f"/resolve/.*{where}", status=status, times=99) for method in ("HEAD", "GET")
    ]
    if status == 401:
        pushed.faults[0].headers["X-Error-Message"] = "Invalid credentials in Authorization header"
    refused(kind, match)
    assert not cached("*.safetensors")
    pushed.faults.clear()
    assert same(Generator.from_pretrained(REPO), generator)


def test_a_gated_repository_says_how_to_get_in(pushed):
    pushed.repositories[REPO].gated = True
    refused(PermissionError, "got a gated repository; ask for access on its page", token=False)
    with pytest.raises(PermissionError, match="push_to_hub: ada/tiny must be"):
        Generator(z_dim=5, **TINY).push_to_hub(REPO, token=False)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_stumbles_once_is_asked_again(pushed, generator, status):
    pushed.faults.append(Fault("HEAD", "/resolve/", status=status))
    assert same(Generator.from_pretrained(REPO), generator)
    pushed.faults.append(Fault("POST", "/preupload/", status=status))
    pushed.faults.append(Fault("PUT", "/lfs/", status=status))
    with torch.no_grad():
        generator.norm.bias += 1
    generator.push_to_hub(REPO)
    assert not pushed.faults
    assert same(Generator.from_pretrained(REPO), generator)


def test_a_connection_cut_in_mid_file_is_resumed_where_it_broke(pushed, generator, monkeypatch):
    pushed.faults += [Fault("GET", WEIGHTS, cut=1000), Fault("GET", WEIGHTS, cut=500)]
    assert same(
        Generator.from_pretrained(REPO, cache_dir="small"), generator
    )  # smaller than the client's buffer
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    pushed.requests.clear()
    pushed.faults += [Fault("GET", WEIGHTS, cut=1000), Fault("GET", WEIGHTS, cut=500)]
    assert same(Generator.from_pretrained(REPO), generator)
    ranges = [r.headers.get("range") for r in pushed.asked("GET", WEIGHTS)]
    assert ranges == [None, "bytes=1000-", "bytes=1500-"]


def test_a_connection_that_keeps_breaking_leaves_no_half_file(pushed, generator):
    pushed.faults.append(Fault("GET", WEIGHTS, cut=0, times=99))
    refused(ConnectionError, f"{pushed.url} must answer, got .*; try again when the network is up")
    assert not cached("*.safetensors")
    pushed.faults.clear()
    assert same(Generator.from_pretrained(REPO), generator)


def test_a_push_that_breaks_leaves_the_repository_as_it_was(pushed, generator):
    before = pushed.repositories[REPO].branches["main"]
    old = Generator.from_pretrained(REPO)
    with torch.no_grad():
        generator.norm.bias += 1
    for fault in (
        Fault("PUT", "/lfs/", status=500, times=99),
        Fault("POST", "/api/repos/create", status=500, times=99),
        Fault("POST", "/preupload/", cut=0, times=99),
        Fault("POST", "/commit/", status=500),
    ):
        pushed.faults = [fault]
        with pytest.raises(ConnectionError, match=r"got 500 from the Hub; try again later|must answer, got"):
            generator.push_to_hub(REPO)
        assert pushed.repositories[REPO].branches["main"] == before
    pushed.faults.clear()
    assert same(Generator.from_pretrained(REPO, force_download=True), old)
    generator.push_to_hub(REPO)
    assert same(Generator.from_pretrained(REPO), generator)


def test_a_token_without_the_right_to_write_is_told_so(pushed, generator, monkeypatch):
    with pytest.raises(
        PermissionError, match=r"push_to_hub: lab/tiny must be open to your token, got .*namespace"
    ):
        generator.push_to_hub("lab/tiny")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="run `hf auth login`"):
        generator.push_to_hub("ada/new")
    assert set(pushed.repositories) == {REPO}
    with pytest.raises(ValueError, match="must be named namespace/name, got 'no name'"):
        generator.push_to_hub("no name")
    with pytest.raises(FileNotFoundError, match="must be a branch, tag or commit of ada/tiny, got 'next'"):
        generator.push_to_hub(REPO, revision="next")


def test_a_full_disk_is_told_and_the_cache_stays_whole(pushed, generator, monkeypatch):
    old = Generator.from_pretrained(REPO)
    with torch.no_grad():
        generator.norm.bias += 1
    generator.push_to_hub(REPO)

    def full(url, temp_file, **options):
        temp_file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        refused(OSError, "must be writable, got No space left on device; make room there, or choose another")
    cached()
    before = list(pushed.repositories[REPO].commits)[2]
    assert same(Generator.from_pretrained(REPO, revision=before, local_files_only=True), old)
    assert same(Generator.from_pretrained(REPO), generator)


def test_a_cache_that_cannot_be_written_is_named(pushed, monkeypatch):
    Path("file").write_text("")
    error = refused(OSError, "file.* must be writable, got .*choose another place with cache_dir or HF_HOME",
                    cache_dir="file")  # fmt: skip
    assert error.errno

    def forbid(*_, **__):
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr(os, "makedirs", forbid)
    refused(PermissionError, "/cache must be writable, got Permission denied")


def test_without_a_network_the_cache_serves(pushed, generator):
    refused(FileNotFoundError, "ada/tiny at main must be in the cache while offline", local_files_only=True)
    Generator.from_pretrained(REPO)
    pushed.requests.clear()
    assert same(Generator.from_pretrained(REPO, local_files_only=True), generator)
    refused(FileNotFoundError, "ada/tiny at v1 must be in the cache", local_files_only=True, revision="v1")
    refused(FileNotFoundError, "must be in the cache", local_files_only=True, cls=Discriminator)
    assert not pushed.requests
    pushed.faults.append(Fault("HEAD", "/resolve/", times=99, status=503))
    assert same(Generator.from_pretrained(REPO), generator)


OFFLINE = """
import sys
from sagan_kernels import Generator
for cache in sys.argv[1:]:
    for act in (
        lambda: Generator.from_pretrained("ada/tiny", cache_dir=cache),
        lambda: Generator.from_pretrained("ada/tiny", cache_dir=cache, force_download=True),
        lambda: Generator(32, 0, z_dim=5, base_channels=2, attention_at=()).push_to_hub("ada/tiny"),
    ):
        try:
            print(act().config["z_dim"])
        except Exception as error:
            print(type(error).__name__, error)
"""


def test_hf_hub_offline_is_obeyed(pushed):
    Generator.from_pretrained(REPO, cache_dir="full")
    pushed.requests.clear()
    lines = run([sys.executable, "-c", OFFLINE, "full", "none"], HF_HUB_OFFLINE="1").stdout.splitlines()
    wanted = "ConnectionError push_to_hub: the Hub must be reached, got HF_HUB_OFFLINE=1; unset it"
    forced = "ConnectionError from_pretrained: the Hub must be reached, got HF_HUB_OFFLINE=1; unset it"
    missing = (
        "FileNotFoundError from_pretrained: ada/tiny at main must be in the cache while offline, got nothing there; "
        "load it once with the network on, or give a folder"
    )
    assert lines == ["5", forced, wanted, missing, forced, wanted]
    assert not pushed.requests


def run(command, **env):
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | env,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done
