"""Import paths that version 0.1.0 documented: they still work, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from typing import Any

MOVED = {
    "fastddpm.data": "fastddpm.storage.datasets",
    "fastddpm.fid": "fastddpm.evaluate.fid",
    "fastddpm.job": "fastddpm.sampling.job",
    "fastddpm.likelihood": "fastddpm.evaluate.likelihood",
    "fastddpm.noise": "fastddpm.core.noise",
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module at its new place and registers it under the old name too."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        warnings.warn(f"{spec.name} is now {MOVED[spec.name]}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        """Restore the spec of the module, which has been executed already."""
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the old import paths work."""
    sys.meta_path.append(MovedModules())
