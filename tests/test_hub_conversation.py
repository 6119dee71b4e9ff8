"""The Hub's real client and ours against a Hub on the loopback interface: push, pull, pin, and what goes wrong."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hub_client import REPO, TINY, refused, same
from hub_routes import Account
from hub_server import Fault
from huggingface_hub import HfApi, ModelCard, file_download

import sagan_kernels
from sagan_kernels.cli import cli
from sagan_kernels.models import Discriminator, Generator

pytestmark = [
    pytest.mark.usefixtures("ada"),
    # the client's own upload of LFS files calls its HTTP library in a deprecated way
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),
]


def test_pushed_network_is_pulled_bit_for_bit(pushed, generator):
    again = Generator.from_pretrained(REPO)
    assert same(again, generator)
    assert not again.training
    assert (again.config, again.class_names) == (generator.config, ["cat", "dog", "axolotl"])
    assert Discriminator.from_pretrained(REPO).class_names == ["cat", "dog", "axolotl"]


def test_a_push_is_one_commit_and_keeps_the_other_network_and_the_card(pushed, generator):
    repository = pushed.repositories[REPO]
    assert [commit.title for commit in repository.commits.values()] == [
        "put", "Put the generator's weights", "Put the discriminator's weights",
    ]  # fmt: skip
    pushed.put(REPO, {"README.md": b"---\nlicense: mit\n---\nby hand\n"})
    generator.push_to_hub(REPO, commit_message="again")
    assert pushed.content(REPO, "README.md").endswith(b"by hand\n")
    assert set(json.loads(pushed.content(REPO, "config.json"))["sha256"]) == {
        "generator.safetensors", "discriminator.safetensors",
    }  # fmt: skip
    Discriminator.from_pretrained(REPO)


def test_a_push_tells_where_it_went(hub, generator):
    url = generator.push_to_hub(REPO)
    assert url == f"{hub.url}/{REPO}/commit/{hub.repositories[REPO].branches['main']}"
    url = generator.push_to_hub(REPO, class_names=list("abc"), create_pr=True)
    assert url == f"{hub.url}/{REPO}/discussions/1"
    assert Generator.from_pretrained(REPO).class_names is None
    assert Generator.from_pretrained(REPO, revision="refs/pr/1").class_names == list("abc")


def test_a_new_repository_gets_a_card_that_the_hub_understands(pushed):
    data = ModelCard(pushed.content(REPO, "README.md").decode()).data
    assert data.library_name == "sagan-kernels"
    assert data.pipeline_tag == "unconditional-image-generation"


def test_private_repositories_stay_private(hub, generator, monkeypatch):
    generator.push_to_hub(REPO, private=True)
    assert hub.repositories[REPO].private
    assert same(Generator.from_pretrained(REPO), generator)
    monkeypatch.delenv("HF_TOKEN")
    refused(FileNotFoundError, "must be a folder here or a repository", cache_dir="elsewhere")
    hub.tokens["other"] = Account("bob", {"bob": "write"})
    refused(FileNotFoundError, "run `hf auth login` if it is private", token="other", cache_dir="elsewhere")
    assert same(Generator.from_pretrained(REPO, token="secret", cache_dir="elsewhere"), generator)


def test_a_pinned_revision_stays_what_it_was(pushed, generator):
    first = pushed.repositories[REPO].branches["main"]
    HfApi().create_tag(REPO, tag="v1")
    with torch.no_grad():
        generator.norm.bias += 1
    generator.push_to_hub(REPO)
    newest = Generator.from_pretrained(REPO)
    assert same(newest, generator)
    for revision in ("v1", first):
        assert torch.equal(Generator.from_pretrained(REPO, revision=revision).norm.bias + 1, newest.norm.bias)


def test_config_and_weights_are_of_one_commit_even_if_somebody_pushes_in_between(pushed, generator):
    before = Generator.from_pretrained(REPO, cache_dir="first")
    fetch = file_download.http_get

    def push_in_between(url, *args, **options):
        if url.endswith("config.json"):
            with torch.no_grad():
                generator.norm.bias += 1
            pushed.put(REPO, {"generator.safetensors": safetensors.torch.save(generator.state_dict())})
        return fetch(url, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_download, "http_get", push_in_between)
        assert same(Generator.from_pretrained(REPO), before)


def test_a_push_over_somebody_elses_is_refused_and_theirs_stays(pushed, generator, monkeypatch):
    save = Generator.save_pretrained

    def somebody_pushes_meanwhile(*args, **options):
        pushed.put(REPO, {"README.md": b"theirs"})
        return save(*args, **options)

    monkeypatch.setattr(Generator, "save_pretrained", somebody_pushes_meanwhile)
    with torch.no_grad():
        generator.norm.bias += 1
    with pytest.raises(
        ConnectionError, match="must stay as it is during a push, got another commit; push again"
    ):
        generator.push_to_hub(REPO)
    assert pushed.content(REPO, "README.md") == b"theirs"


def test_a_second_load_fetches_nothing_and_force_download_fetches_all(pushed):
    Generator.from_pretrained(REPO)
    assert len(pushed.asked("GET", "/resolve/")) == 2
    pushed.requests.clear()
    Generator.from_pretrained(REPO)
    assert [r.method for r in pushed.requests] == ["HEAD"]  # config.json: what the Hub counts as a download
    Generator.from_pretrained(REPO, force_download=True)
    assert len(pushed.asked("GET", "/resolve/")) == 2


def test_a_subfolder_is_a_model_folder_of_its_own(hub, generator, tmp_path):
    folder = generator.save_pretrained(tmp_path / "out" / "deep" / "er")
    files = {f"deep/er/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.put(REPO, files)
    assert same(Generator.from_pretrained(REPO, subfolder="deep/er"), generator)
    assert same(Generator.from_pretrained(tmp_path / "out", subfolder="deep/er"), generator)
    refused(FileNotFoundError, r"ada/tiny must hold config\.json, got deep/er/config\.json")
    refused(FileNotFoundError, r"ada/tiny must hold deep/config\.json", subfolder="deep")


def test_every_request_names_library_and_version(hub, generator):
    """Trap 7: the stock mixin says unknown/None."""
    generator.push_to_hub(REPO)
    Generator.from_pretrained(REPO)
    told = [r for r in hub.requests if r.path.startswith("/api/models/") or "/resolve/" in r.path]
    assert {r.method for r in told} == {"GET", "HEAD", "POST"}
    for request in told:
        assert request.headers["user-agent"].startswith(f"sagan-kernels/{sagan_kernels.__version__};"), (
            request.path
        )


def test_a_pushed_network_needs_every_tensor(hub, generator, tmp_path):
    """Trap 1: the stock mixin loads a checkpoint with missing and foreign tensors without a word."""
    folder = generator.save_pretrained(tmp_path / "out")
    tensors = generator.state_dict()
    tensors["stranger"] = tensors.pop("norm.weight")
    content = safetensors.torch.save(tensors)
    config = json.loads((folder / "config.json").read_text())
    config["sha256"]["generator.safetensors"] = hashlib.sha256(content).hexdigest()
    hub.put(REPO, {"generator.safetensors": content, "config.json": json.dumps(config).encode()})
    refused(ValueError, r"1 missing: norm\.weight; 1 unexpected: stranger")


def test_the_command_line_draws_from_a_repository_and_fails_in_one_line(pushed):
    done = CliRunner().invoke(cli, ["sample", REPO, "--seeds", "0-1", "--label", "axolotl", "--out", "out"])
    assert done.exit_code == 0, done.output
    assert len(list(Path("out").iterdir())) == 2
    assert len(pushed.asked("HEAD", "config.json")) == 1  # counted as one download
    for code, name, message in (
        (
            2,
            "ada/none",
            "sagan: from_pretrained: 'ada/none' must be a folder here or a repository on the Hub",
        ),
        (1, "ada/open", "sagan: from_pretrained: ada/open must be served, got 503 from the Hub"),
    ):
        pushed.faults.append(Fault("HEAD", "ada/open", status=503, times=99))
        done = CliRunner().invoke(cli, ["sample", name])
        assert (done.exit_code, done.stdout) == (code, "")
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_nothing_is_printed_on_stdout(pushed, capfd, tmp_path):
    """Trap 8: the stock mixin prints that it loads from a local directory."""
    Generator.from_pretrained(REPO).save_pretrained(tmp_path / "out")
    Generator.from_pretrained(tmp_path / "out").push_to_hub("ada/other")
    assert capfd.readouterr().out == ""


FUTURE = """
from __future__ import annotations
from sagan_kernels.models import Generator

class Small(Generator):
    def __init__(self, z_dim: int = 5, attention_at: tuple[int, ...] = (), num_classes: int = 0) -> None:
        super().__init__(32, num_classes, z_dim, 2, attention_at=attention_at)
        self.config = {"z_dim": z_dim, "attention_at": list(attention_at), "num_classes": num_classes}
"""


def test_annotations_as_strings_change_nothing(hub):
    """Trap 3: the stock mixin decodes a config by annotations, which a __future__ import turns into texts."""
    names: dict = {}
    exec(compile(FUTURE, "small.py", "exec"), names)
    model = names["Small"]().eval()
    model.push_to_hub(REPO)
    again = names["Small"].from_pretrained(REPO)
    assert same(again, model)
    assert again.config == model.config


@dataclass
class Width:
    first: int = 2


@pytest.mark.parametrize(
    ("value", "kind", "match"),
    [((1, 2), ValueError, "what JSON gives back as it was"), (Width(), TypeError, "Width")],
)
def test_a_config_that_would_not_come_back_as_it_was_is_refused(hub, generator, value, kind, match):
    """Traps 4 and 5: the stock mixin gives tuples back as lists and dataclasses as dicts."""
    generator.config["extra"] = value
    with pytest.raises(kind, match=match):
        generator.push_to_hub(REPO)
    assert not hub.repositories


def test_a_sequence_of_any_kind_comes_back_equal(hub):
    models = [Generator(z_dim=5, **TINY | {"base_channels": 8, "attention_at": at}) for at in ((16,), [16])]
    models[0].push_to_hub(REPO)
    assert Generator.from_pretrained(REPO).config == models[0].config == models[1].config


def test_an_unknown_setting_is_refused_and_foreign_keys_beside_ours_are_kept(pushed, generator):
    """Trap 6: the stock mixin drops what it does not know, so a newer config loads as something else."""
    config = json.loads(pushed.content(REPO, "config.json")) | {"architecture": "sagan_32_discriminator"}
    pushed.put(REPO, {"config.json": json.dumps(config).encode()})
    assert same(Generator.from_pretrained(REPO), generator)
    generator.push_to_hub(REPO)
    assert json.loads(pushed.content(REPO, "config.json"))["architecture"] == "sagan_32_discriminator"
    config["generator"]["depth"] = 3
    pushed.put(REPO, {"config.json": json.dumps(config).encode()})
    refused(ValueError, r"config\.json: generator must be arguments of Generator, got .*'depth'")


def test_commands_take_a_revision(ada):
    for seed, revision in ((0, "old"), (1, "main")):
        torch.manual_seed(seed)
        model = Generator(z_dim=5, **TINY).eval()
        model.save_pretrained(revision)
        files = {path.name: path.read_bytes() for path in Path(revision).iterdir()}
        ada.put("ada/g", files, revision=revision)
    for revision in ("old", "main"):
        command = [
            "sample",
            "ada/g",
            "--revision",
            revision,
            "--seeds",
            "3",
            "--label",
            "1",
            "--out",
            f"of_{revision}",
        ]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
        CliRunner().invoke(
            cli, ["sample", revision, "--seeds", "3", "--label", "1", "--out", f"local_{revision}"]
        )
        drawn, expected = (
            Path(f"{kind}_{revision}/seed0003_label1.png").read_bytes() for kind in ("of", "local")
        )
        assert drawn == expected
    refused = CliRunner().invoke(cli, ["sample", "old", "--revision", "main"])
    assert refused.exit_code == 2
    assert "revision must be left out for 'old', which is not on the Hub, got 'main'" in refused.output
