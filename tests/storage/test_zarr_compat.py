"""Zarr's private modules are imported in one place."""

import re
from pathlib import Path

import oocattn.storage.zarr_compat


def test_only_zarr_compat_imports_private_modules_of_zarr() -> None:
    package = Path(oocattn.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^\s*(from|import) zarr\.(core|abc|buffer|dtype|_)", path.read_text(), re.MULTILINE)
    }
    assert found == {"storage/zarr_compat.py"}
