"""Files that are either whole or not there: written under a temporary name, flushed, then renamed."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

Write = Callable[[Path], object]
"""Writes the whole content of a file to the path it is given."""


def write_atomically(path: str | os.PathLike[str], write: Write) -> Path:
    """Call `write(temporary)` beside `path`, then rename; on any failure the old file at `path` stays whole.

    Args:
        path: where the file is to be.
        write: writes the whole content to the path it is given.

    Returns:
        `path`.

    Raises:
        OSError: no permission, no space; its message names `path`.
    """
    path = Path(path)
    write_together({path: write})
    return path


def write_together(contents: Mapping[Path, Write]) -> None:
    """`write_atomically` for files that belong together: none is renamed before all are written and flushed.

    Raises:
        OSError: no permission, no space; its message names the file. The old files stay whole.
    """
    temporaries: dict[Path, Path] = {}
    path = Path()
    try:
        for path, write in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
            os.close(handle)
            temporaries[path] = Path(name)
            write(temporaries[path])
            with temporaries[path].open("rb+") as file:
                os.fsync(file.fileno())
            temporaries[path].chmod(0o666 & ~_umask())
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path}: could not be written, {error.strerror or error}; the old file is still whole",
        ) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed process left in `folder` or below it."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}\.[a-z]+", path.name) and path.is_file():
            path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
