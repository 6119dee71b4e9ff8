"""What the loopback Hub knows and answers: repositories, revisions, tokens with roles, and a function a route.

Everything lies in memory, under the name of its content: git's SHA-1 of a small file, SHA-256 of an LFS file.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".png", ".npz")
DATE = "2026-01-01T00:00:00.000Z"
REPO = r"(?P<repo>[^/]+/[^/]+)"
REV = r"(?P<rev>[^/]+)"


@dataclass
class Account:
    """Who a token belongs to, and what it may do in which namespace: "read" or "write"."""

    name: str
    roles: dict[str, str]


@dataclass
class File:
    oid: str
    size: int
    lfs: bool


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str, title: str, files: dict[str, File]) -> Commit:
        """Put `files` on top of a branch."""
        parent = self.branches.get(revision)
        text = json.dumps([parent, title, sorted((path, file.oid) for path, file in files.items())])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files)
        self.commits[commit.sha] = commit
        self.branches[revision] = commit.sha
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)


class Store:
    """All that the Hub keeps.

    Attributes:
        url: where the server listens.
        repositories: by "namespace/name".
        objects: file contents by their name.
        tokens: account of each token that is valid.
        unknown: method and path of requests that no route fits.
    """

    url: str

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: dict[str, Account] = {}
        self.unknown: list[str] = []

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main", **settings: Any) -> Commit:
        """Commit `files` without the client: a repository that somebody else, perhaps an enemy, has made."""
        repository = self.repositories.setdefault(repo, Repository(**settings))
        before = repository.find(revision)
        added = {path: self.store(path, content) for path, content in files.items()}
        return repository.commit(revision, "put", (before.files if before else {}) | added)

    def store(self, path: str, content: bytes) -> File:
        lfs = path.endswith(LFS_SUFFIXES)
        oid = hashlib.sha256(content).hexdigest() if lfs else _git_oid(content)
        self.objects[oid] = content
        return File(oid, len(content), lfs)

    def content(self, repo: str, path: str, revision: str = "main") -> bytes:
        commit = self.repositories[repo].find(revision)
        assert commit is not None, revision
        return self.objects[commit.files[path].oid]


class Refusal(Exception):
    """An answer with a code that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any) -> None:
        super().__init__(message)
        self.status, self.content = status, {"error": message} | content
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Exchange:
    """One request and what its handler needs: the account, the body, the repository with the right to use it."""

    def __init__(self, hub: Store, path: str, headers: dict[str, str], body: bytes) -> None:
        self.hub, self.body, self.headers = hub, body, headers
        self.query = parse_qs(urlsplit(path).query)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme and token not in hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.account = hub.tokens[token] if scheme else None

    def role(self, namespace: str) -> str | None:
        return self.account.roles.get(namespace) if self.account else None

    def repository(self, name: str, *, write: bool = False) -> Repository:
        found, role = self.hub.repositories.get(name), self.role(name.split("/")[0])
        if found is None or (found.private and role is None):
            raise Refusal(404 if self.account else 401, "Repository not found", "RepoNotFound")
        if found.gated and role is None:
            raise Refusal(403 if self.account else 401, f"Access to {name} is restricted", "GatedRepo")
        if write and self.account is None:
            raise Refusal(401, "Invalid username or password.")
        if write and role != "write":
            raise Refusal(403, f"You don't have write access to {name}")
        return found

    def commit(self, name: str, revision: str) -> Commit:
        found = self.repository(name).find(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    content: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


@route("GET", "/api/agent-harnesses")
def agent_harnesses(x: Exchange) -> Any:
    return {}


@route("GET", "/api/whoami-v2")
def whoami(x: Exchange) -> Any:
    if x.account is None:
        raise Refusal(401, "Invalid username or password.")
    orgs = [{"name": name} for name in x.account.roles if name != x.account.name]
    role = x.account.roles.get(x.account.name, "read")
    token = {"accessToken": {"displayName": "test", "role": role}}
    return {"type": "user", "name": x.account.name, "orgs": orgs, "auth": token}


@route("POST", "/api/validate-yaml")
def validate_yaml(x: Exchange) -> Any:
    text = x.json()["content"]
    try:
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except yaml.YAMLError as error:
        raise Refusal(400, "Bad YAML", errors=[{"message": str(error)}], warnings=[]) from error
    warnings = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warnings}


@route("POST", "/api/repos/create")
def create(x: Exchange) -> Any:
    asked = x.json()
    if x.account is None:
        raise Refusal(401, "Invalid username or password.")
    namespace = asked.get("organization") or x.account.name
    name = f"{namespace}/{asked['name']}"
    if x.role(namespace) != "write":
        raise Refusal(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
    if name in x.hub.repositories:
        raise Refusal(409, "You already created this model repo", url=f"{x.hub.url}/{name}")
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    x.hub.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
    return {"url": f"{x.hub.url}/{name}", "name": name}


@route("GET", r"/api/organizations/(?P<name>[^/]+)/overview")
def organization(x: Exchange, name: str) -> Any:
    return {"name": name, "fullname": name, "isVerified": False}


@route("GET", "/api/models")
def list_models(x: Exchange) -> Any:
    author = x.query.get("author", [""])[0]
    names = [n for n, r in x.hub.repositories.items() if not r.private or x.role(n.split("/")[0])]
    return [{"id": n, "modelId": n, "private": False} for n in names if n.startswith(author)]


@route("GET", rf"/api/models/{REPO}(?:/revision/{REV})?")
def info(x: Exchange, repo: str, rev: str | None = None) -> Any:
    commit, private = x.commit(repo, rev or "main"), x.repository(repo).private
    siblings = [{"rfilename": path} | _blob(file) for path, file in commit.files.items()]
    return {
        "id": repo, "modelId": repo, "sha": commit.sha, "siblings": siblings, "private": private, "tags": [],
        "lastModified": DATE, "createdAt": DATE, "author": repo.split("/")[0],
    }  # fmt: skip


@route("GET", rf"/api/models/{REPO}/tree/{REV}(?:/(?P<at>.*))?")
def tree(x: Exchange, repo: str, rev: str, at: str = "") -> Any:
    below = f"{at}/" if at else ""
    files = {path: file for path, file in x.commit(repo, rev).files.items() if path.startswith(below)}
    if x.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
        return [_entry(path, file) for path, file in files.items()]
    names = {path: path.removeprefix(below).split("/") for path in files}
    folders = sorted({below + parts[0] for parts in names.values() if len(parts) > 1})
    return [{"type": "directory", "path": path, "oid": _git_oid(path.encode())} for path in folders] + [
        _entry(path, files[path]) for path, parts in names.items() if len(parts) == 1
    ]


@route("POST", rf"/api/models/{REPO}/paths-info/{REV}")
def paths_info(x: Exchange, repo: str, rev: str) -> Any:
    form = parse_qs(x.body.decode()) if b"paths=" in x.body else x.json()
    files = x.commit(repo, rev).files
    return [_entry(path, files[path]) for path in form["paths"] if path in files]


@route("GET", rf"/api/models/{REPO}/refs")
def refs(x: Exchange, repo: str) -> Any:
    found = x.repository(repo)
    branches, tags = (
        [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in refs.items()]
        for kind, refs in (("heads", found.branches), ("tags", found.tags))
    )
    return {"branches": branches, "tags": tags, "converts": []}


@route("GET", rf"/api/models/{REPO}/commits/{REV}")
def commits(x: Exchange, repo: str, rev: str) -> Any:
    history, commit = [], x.commit(repo, rev)
    while commit is not None:
        history.append({"id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": DATE})
        commit = x.repository(repo).commits.get(commit.parent or "")
    return history


@route("POST", rf"/api/models/{REPO}/tag/{REV}")
def tag(x: Exchange, repo: str, rev: str) -> Any:
    tags, name = x.repository(repo, write=True).tags, x.json()["tag"]
    if name in tags:
        raise Refusal(409, f"Tag {name} exists already")
    tags[name] = x.commit(repo, rev).sha
    return {}


@route("POST", rf"/api/models/{REPO}/branch/{REV}")
def branch(x: Exchange, repo: str, rev: str) -> Any:
    start = x.commit(repo, (json.loads(x.body or b"{}")).get("startingPoint", "main"))
    x.repository(repo, write=True).branches[rev] = start.sha
    return {}


@route("POST", rf"/api/models/{REPO}/preupload/{REV}")
def preupload(x: Exchange, repo: str, rev: str) -> Any:
    x.repository(repo, write="create_pr" not in x.query)
    known, answers = x.commit(repo, rev).files, []
    for asked in x.json()["files"]:
        path = asked["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        if path in known:
            answers[-1]["oid"] = known[path].oid
    return {"files": answers}


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(x: Exchange, repo: str) -> Any:
    x.repository(repo)
    objects = []
    for wanted in x.json()["objects"]:
        href = f"{x.hub.url}/lfs/{wanted['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(wanted | ({} if wanted["oid"] in x.hub.objects else {"actions": actions}))
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(x: Exchange, oid: str) -> Any:
    if (found := hashlib.sha256(x.body).hexdigest()) != oid:
        raise Refusal(400, f"sha256 must be {oid}, got {found}")
    x.hub.objects[oid] = x.body
    return {}


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(x: Exchange, oid: str) -> Any:
    if len(x.hub.objects.get(oid, b"")) != x.json()["size"]:
        raise Refusal(404, "No such object")
    return {}


@route("POST", rf"/api/models/{REPO}/commit/{REV}")
def commit(x: Exchange, repo: str, rev: str) -> Any:
    asks = "create_pr" in x.query
    found, parent = x.repository(repo, write=not asks), x.commit(repo, rev)
    header, *operations = (json.loads(line) for line in x.body.splitlines())
    if header["value"].get("parentCommit") not in (None, parent.sha):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        if kind == "file":
            content = base64.b64decode(value["content"])
            files[path] = File(_git_oid(content), len(content), lfs=False)
            x.hub.objects[files[path].oid] = content
        elif kind == "lfsFile":
            if value["oid"] not in x.hub.objects:
                raise Refusal(400, f"LFS object of {path} was not uploaded")
            files[path] = File(value["oid"], value["size"], lfs=True)
        elif kind == "deletedFile":
            del files[path]
        else:
            raise Refusal(400, f"operation {kind!r} is not spoken here")
    number = 1 + sum(name.startswith("refs/pr/") for name in found.branches)
    if asks:
        rev = f"refs/pr/{number}"
        found.branches[rev] = parent.sha
    new = found.commit(rev, header["value"]["summary"], files)
    request = {"pullRequestUrl": f"{x.hub.url}/{repo}/discussions/{number}"} if asks else {}
    return {"commitUrl": f"{x.hub.url}/{repo}/commit/{new.sha}", "commitOid": new.sha} | request


@route("GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)")
def resolve(x: Exchange, repo: str, rev: str, path: str) -> Any:
    commit = x.commit(repo, rev)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if path not in commit.files:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.headers |= headers
        raise refusal
    file = commit.files[path]
    content = x.hub.objects[file.oid]
    headers["ETag"] = f'"{file.oid}"'
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
    if asked := re.fullmatch(r"bytes=(\d+)-", x.headers.get("range", "")):
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return Answer(content[start:], 206, headers)
    return Answer(content, 200, headers)


def answer_to(hub: Store, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    verb, bare = "GET" if method == "HEAD" else method, urlsplit(path).path
    # repositories of kernels have the routes of models under a name of their own
    bare = re.sub(r"^/(api/)?kernels/", lambda m: "/api/models/" if m[1] else "/", bare)
    for wanted, pattern, handler in ROUTES:
        if wanted == verb and (match := pattern.fullmatch(bare)):
            groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            try:
                result = handler(Exchange(hub, path, headers, body), **groups)
            except Refusal as refusal:
                return Answer(refusal.content, refusal.status, refusal.headers)
            return result if isinstance(result, Answer) else Answer(result)
    hub.unknown.append(f"{method} {bare}")
    return Answer({"error": "no such route"}, 404)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _blob(file: File) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": file.oid, "oid": file.oid, "size": file.size, "pointerSize": 130}}
    return {"size": file.size, "blobId": file.oid} | (lfs if file.lfs else {})


def _entry(path: str, file: File) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": file.oid} | _blob(file)
