"""Between model folders and the Hugging Face Hub: files fetched into its cache, and pushed as one commit.

Whatever the client library raises leaves here as a built-in error with one line: FileNotFoundError for what is not
there, PermissionError for a token without the right, ConnectionError for a Hub that cannot be reached or does not
serve, OSError for a cache that cannot be written, ValueError for a name or an option that is none.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import sagan_kernels

LIBRARY_NAME = "sagan-kernels"
PIPELINE_TAG = "unconditional-image-generation"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Access:
    """How files of a repository on the Hub are got at.

    Attributes:
        revision: branch, tag or commit; None for the branch main.
        token: of an account that may read; True for the stored one, False for none, None for the stored one if any.
        cache_dir: where files are kept; None for the client library's own place, which HF_HOME sets.
        local_files_only: take what the cache has and ask nobody.
        force_download: fetch again what the cache has.
        subfolder: of the repository, with "/" between parts.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str | None = None

    def __post_init__(self) -> None:
        for what in ("revision", "subfolder"):
            _check_relative(what, getattr(self, what))

    def fetch(self, repo_id: str, filename: str, where: str = "from_pretrained") -> Path:
        """The file in the cache, fetched when it is not there; its folder belongs to one commit.

        Raises:
            FileNotFoundError: no such repository, revision or file; the message lists what the repository has.
            PermissionError: the token, or its lack, gives no right to read.
            ConnectionError: the Hub does not answer, or with an error, and the cache has nothing.
            OSError: the cache cannot be written; what it held before is still whole.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with _one_line_errors(where, repo_id, self.revision):
            try:
                path = hf_hub_download(
                    repo_id,
                    filename,
                    subfolder=self.subfolder,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    force_download=self.force_download,
                    library_name=LIBRARY_NAME,
                    library_version=sagan_kernels.__version__,
                )
            except RemoteEntryNotFoundError as error:
                files = _client(self.token).list_repo_files(repo_id, revision=self.revision)
                raise FileNotFoundError(
                    f"{where}: {repo_id} must hold {PurePosixPath(self.subfolder or '', filename)}, "
                    f"got {told_files(name for name in files if name != '.gitattributes')}"
                ) from error
        return Path(path)

    def commit(self, path: Path) -> str:
        """The commit that a fetched file belongs to."""
        return path.parents[len(PurePosixPath(self.subfolder or "").parts)].name


def is_repo_id(name: str) -> bool:
    """Whether `name` could be a repository of the Hub: namespace/name."""
    return ".." not in name and re.fullmatch(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def told_files(names: Iterable[str]) -> str:
    """What a folder or repository holds, for a message; a pickle alone is refused with the reason."""
    ordered = sorted(names)
    pickles = [name for name in ordered if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in ordered):
        return f"{pickles[0]}, a pickle, refused because loading one can run any code; ask for safetensors"
    return told_names(ordered)


def told_names(names: Iterable[str]) -> str:
    """The first few of `names`, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return (", ".join(ordered[:3]) or "nothing") + more


def remote_files(
    repo_id: str, *, token: str | bool | None = None, revision: str | None = None
) -> tuple[str | None, list[str]]:
    """The commit at `revision` and its files; (None, []) when there is no such repository.

    Raises:
        FileNotFoundError: the repository has no such revision.
        PermissionError, ConnectionError: as `Access.fetch`.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with _one_line_errors("push_to_hub", repo_id, revision):
        try:
            info = _client(token).model_info(repo_id, revision=revision)
        except RepositoryNotFoundError:
            return None, []
    return info.sha, [sibling.rfilename for sibling in info.siblings or ()]


def push(
    repo_id: str,
    folder: Path,
    *,
    message: str,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
    where: str = "push_to_hub",
) -> str:
    """Put every file of `folder` into a repository as one commit; the repository is made when it is not there.

    Args:
        repo_id: "namespace/name".
        folder: its files and subfolders.
        message: of the commit.
        token: of an account that may write; None for the stored one.
        revision: branch; None for main.
        private: of a repository that is made; None for the namespace's default.
        create_pr: open a pull request instead of committing to the branch.
        parent_commit: refuse if the branch has moved on from it.
        where: what errors begin with.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ValueError: no repository name.
        PermissionError, ConnectionError: as `Access.fetch`; the branch is as it was.
        FileNotFoundError: the repository has no such branch.
    """
    from huggingface_hub import CommitOperationAdd

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with _one_line_errors(where, repo_id, revision):
        client = _client(token)
        client.create_repo(repo_id, private=private, exist_ok=True)
        commit = client.create_commit(
            repo_id,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent_commit,
        )
    return commit.pr_url or commit.commit_url


@contextmanager
def _one_line_errors(where: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Inside, errors of the client library become built-in ones with one line."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        yield
    except (OSError, RuntimeError, ValueError, httpx.HTTPError) as error:
        told = _translated(error, where, repo_id, revision or "main")
        if told is error:
            raise
        raise told from error


def _check_relative(what: str, path: str | None) -> None:
    if path is not None and (
        "\\" in path or ":" in path or any(part in ("", ".", "..") for part in path.split("/"))
    ):
        raise ValueError(
            f"from_pretrained: {what} must be a relative name without '..', got {path!r}; leave it out for none"
        )


def cache_folder() -> str:
    """Where the Hub's client keeps what it has fetched."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _client(token: str | bool | None):  # type: ignore[no-untyped-def]  # HfApi, imported when it is needed
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name=LIBRARY_NAME, library_version=sagan_kernels.__version__)


def _translated(error: Exception, where: str, repo_id: str, revision: str) -> Exception:
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    cause = error.__cause__
    match error:
        case errors.HFValidationError():
            return ValueError(
                f"{where}: a repository must be named namespace/name, got {repo_id!r}; ./{repo_id} is a folder"
            )
        case errors.LocalEntryNotFoundError() if cause is None or isinstance(
            cause, errors.OfflineModeIsEnabled
        ):
            return FileNotFoundError(
                f"{where}: {repo_id} at {revision} must be in the cache while offline, got nothing there; "
                "load it once with the network on, or give a folder"
            )
        case (
            errors.LocalEntryNotFoundError() | errors.FileMetadataError() | RuntimeError() | ValueError()
        ) if isinstance(cause, Exception):
            return _translated(cause, where, repo_id, revision)
        case errors.OfflineModeIsEnabled():
            return ConnectionError(f"{where}: the Hub must be reached, got HF_HUB_OFFLINE=1; unset it")
        case errors.GatedRepoError():
            return PermissionError(
                f"{where}: {repo_id} must be open to you, got a gated repository; ask for access on its page "
                "and run `hf auth login`"
            )
        case errors.RepositoryNotFoundError():
            return FileNotFoundError(
                f"{where}: {repo_id!r} must be a folder here or a repository on the Hub, got neither; "
                "check the name, and run `hf auth login` if it is private"
            )
        case errors.RevisionNotFoundError():
            return FileNotFoundError(
                f"{where}: revision must be a branch, tag or commit of {repo_id}, got {revision!r}"
            )
        case errors.LocalTokenNotFoundError():
            return PermissionError(f"{where}: a token must be stored, got none; run `hf auth login`")
        case errors.HfHubHTTPError() | httpx.HTTPStatusError():
            return _refused(error, where, repo_id, revision)
        case httpx.HTTPError():
            return ConnectionError(
                f"{where}: {constants.ENDPOINT} must answer, got {_short(error)}; try again when the network is up"
            )
        case OSError() if error.errno is not None:
            place = error.filename or constants.HF_HUB_CACHE
            kind = PermissionError if isinstance(error, PermissionError) else OSError
            return kind(
                error.errno,
                f"{where}: {place} must be writable, got {error.strerror}; "
                "make room there, or choose another place with cache_dir or HF_HOME",
            )
        case OSError() if "Consistency check failed" in str(error):
            return ConnectionError(
                f"{where}: {repo_id} must come whole, got fewer bytes than announced; try again"
            )
    return error


def _refused(error: Exception, where: str, repo_id: str, revision: str) -> Exception:
    """What a status code means, for a user."""
    response = error.response  # type: ignore[attr-defined]
    status = response.status_code
    said = response.headers.get("X-Error-Message") or _short(error)
    told = f"{where}: {repo_id}"
    if status == 401:
        return PermissionError(
            f"{told} must be asked for with a valid token, got {said!r}; run `hf auth login`"
        )
    if status == 403:
        return PermissionError(
            f"{told} must be open to your token, got {said!r}; take a token with that right"
        )
    if status == 412:
        return ConnectionError(f"{told} must stay as it is during a push, got another commit; push again")
    if status == 429:
        return ConnectionError(
            f"{told} must be asked for less often, got 429 from the Hub; wait and try again"
        )
    if status >= 500:
        return ConnectionError(f"{told} must be served, got {status} from the Hub; try again later")
    return ConnectionError(f"{told} at {revision} must be served, got {status}: {said}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
