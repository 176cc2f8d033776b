"""Where caches are kept: in the user's cache folder, or, where the home cannot be written, as long as the process."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The folder fastddpm/NAME in $XDG_CACHE_HOME or ~/.cache, perhaps missing; None for a user without a home."""
    path = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "fastddpm", name)
    return path if path.is_absolute() else None


@contextmanager
def library_caches() -> Iterator[None]:
    """In this block, libraries that fail without a home they can write keep their caches in a temporary folder.

    They are Triton, matplotlib and huggingface_hub. A setting of the user, and downloads that are there, stay in use.
    """
    home = os.path.expanduser("~")
    settings = {"TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}
    if not (os.environ.get("XDG_CACHE_HOME") or os.path.isdir(os.path.join(home, ".cache", "huggingface"))):
        settings["HF_HOME"] = "huggingface"
    missing = {name: folder for name, folder in settings.items() if name not in os.environ}
    temporary = None
    if not (os.path.isabs(home) and os.access(home, os.W_OK | os.X_OK)):
        with suppress(OSError):  # without a folder for temporary files either, most commands still work
            temporary = tempfile.mkdtemp(prefix="fastddpm-")
    if temporary is None:
        yield
        return
    os.environ.update({name: os.path.join(temporary, folder) for name, folder in missing.items()})
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
        shutil.rmtree(temporary, ignore_errors=True)
