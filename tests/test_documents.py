"""What the documents say is true: links lead somewhere, commands and code run, fields have their form."""

import datetime
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
import yaml

import sagan_kernels
from sagan_kernels.cli import cli

ROOT = Path(__file__).parents[1]
GUIDES = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *GUIDES)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[str]:
    """Every `sagan ...` in recipes of the Makefile, or in a document's shell blocks and sentences."""
    text = read(name)
    if name != "Makefile":
        text = "\n".join([*code_blocks(name, "bash"), *re.findall(r"`(sagan [^`]+)`", text)])
    return re.findall(r"^\s*(?:\.venv/bin/)?(sagan .*)", text, re.MULTILINE)


COMMANDS = [(name, line) for name in (*DOCUMENTS, "Makefile") for line in commands(name)]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "Makefile"])
def test_documents_that_show_commands_are_searched_for_them(name):
    assert name in {document for document, _ in COMMANDS}


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_command_in_a_document_exists_with_its_options(name, line):
    _, verb, *rest = shlex.split(line, comments=True)
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None, f"{name}: no command {verb!r}"
    options = {option for p in command.get_params(click.Context(command)) for option in p.opts}
    asked = {word.partition("=")[0] for word in rest if word.startswith("-")}
    assert asked <= options, f"{name}: {verb} has {sorted(options)}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_in_a_document_exist(name):
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make (\w+)", read(name), re.MULTILINE)) <= targets


@pytest.mark.parametrize("block", code_blocks("README.md", "python"))
def test_python_in_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_files(name):
    links = re.findall(r"\]\(([^)\s]+)\)", read(name))
    links += re.findall(r"""(?:src|href)=["']([^"']+)""", read(name))
    local = [link.partition("#")[0] for link in links if not urlsplit(link).scheme]
    assert [link for link in local if link and not (ROOT / name).parent.joinpath(link).exists()] == []


def test_every_project_that_is_recognized_has_a_guide():
    from sagan_kernels.swapping.variants import VARIANTS

    text = "".join(read(name) for name in GUIDES)
    missing = [
        v.name for v in VARIANTS if not all(name.split(".")[0] in text for name in (v.query, v.key, v.value))
    ]
    assert missing == []
    assert all(
        f"({name.removeprefix('docs/')})" in read("docs/swapping.md")
        for name in GUIDES
        if "swapping/" in name
    )


def test_changelog_keeps_to_its_form():
    title, first, *others = re.findall(r"^##? .*", read("CHANGELOG.md"), re.MULTILINE)
    assert (title, first) == ("# Changelog", "## [Unreleased]")
    for heading in others:
        release = re.fullmatch(r"## \[(\d+)\.(\d+)\.(\d+)(-[\w.]+)?\] - (\d{4}-\d\d-\d\d)", heading)
        assert release, heading
        datetime.date.fromisoformat(release[5])
    kinds = set(re.findall(r"^###+ .*", read("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {f"### {k}" for k in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}


def test_citation_is_complete():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["license"] == "MIT"
    assert citation["version"] == sagan_kernels.__version__
    assert {"message", "title", "authors"} <= citation.keys()
    papers = {reference["url"].rpartition("/")[2]: reference for reference in citation["references"]}
    assert papers.keys() == {"1805.08318", "1802.05957"}
    for number, paper in papers.items():
        assert {"type", "title", "authors", "year"} <= paper.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])
        assert paper["doi"] == f"10.48550/arXiv.{number}"


def test_citation_has_valid_urls():
    urls = re.findall(r"^[\s-]*(?:url|repository[\w-]*): *(\S+)$", read("CITATION.cff"), re.MULTILINE)
    assert urls
    for url in urls:
        parts = urlsplit(url)
        assert parts.scheme == "https", url
        assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), url


def test_license_is_mit():
    first, copyright_, *_ = [line for line in read("LICENSE").splitlines() if line]
    assert (first, copyright_) == ("MIT License", "Copyright (c) 2026 The sagan-kernels developers")
    words = " ".join(read("LICENSE").split())
    assert (
        "without restriction, including without limitation the rights to use, copy, modify, merge," in words
    )
    assert 'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND' in words
