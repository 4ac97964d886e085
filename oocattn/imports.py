"""Imports that wait until they are needed, and what they need: a home folder, a current folder, no garbage collection."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

IMPORTING = threading.RLock()
"""One thread at a time: libraries whose modules import each other in a circle fail where two threads enter it (numpy)."""


@contextmanager
def collection_paused() -> Iterator[None]:
    """No collection of cyclic garbage while modules are imported: 0.5 of 2.8 s of `oocattn plan` for hardly any garbage.

    Of two threads that import at the same time, the one that began first resumes the collection, perhaps a little early.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def with_some_home() -> Iterator[None]:
    """Within, a user without a home folder, as in a container, has an empty one: bokeh cannot be imported otherwise."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = os.devnull
        try:
            yield
        finally:
            del os.environ["HOME"]
    else:
        yield


@contextmanager
def in_some_folder() -> Iterator[None]:
    """Within, a process whose current folder was removed is in another one, or MKL would end it as torch is imported."""
    try:
        os.getcwd()
    except FileNotFoundError:
        removed = os.open(".", os.O_RDONLY)
        os.chdir("/")
        try:
            yield
        finally:
            os.fchdir(removed)
            os.close(removed)
    else:
        yield


def lazy_attributes(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package (PEP 562), of which each module of `modules` holds some names.

    The names that the package itself holds there are those of modules in it.
    """
    module_of = {name: module for module, names in modules.items() for name in names}
    namespace = vars(sys.modules[package])

    def get_attribute(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with IMPORTING, collection_paused(), in_some_folder():
            if module_of[name] == package:
                return import_module(f"{package}.{name}")  # which makes it an attribute
            found = getattr(import_module(module_of[name]), name)
        namespace[name] = found
        return found

    return get_attribute, lambda: sorted({*namespace, *module_of})


def import_after_zarr(module: str) -> None:
    """Import a module now, if Zarr is imported, else as soon as it is."""
    if "zarr" in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _AfterZarr(module))


class _AfterZarr(MetaPathFinder):
    """Finds Zarr as the other finders do, and has a module imported after it.

    It stays until Zarr is imported: others ask for its spec only to know whether it is installed.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "zarr":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_import(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                if "oocattn.storage.zarr_compat" not in sys.modules:  # else that imports it, once Zarr is there
                    import_module(self._module)

            spec.loader.exec_module = execute_and_import  # type: ignore[method-assign]
        return spec
