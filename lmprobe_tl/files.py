"""Files that are written whole or not at all, and text that is the same for equal content."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".lmprobe_tl.tmp"


def canonical_json(document: Any) -> str:
    """Sorted keys, no spaces, no NaN: equal documents give equal text."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_atomically(target: Path, payload: bytes) -> None:
    """Replace the file; on any failure an older one stays as it was."""
    temporary = target.with_name(f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")  # same folder: os.replace cannot cross disks
    try:
        with open(temporary, "xb") as file:  # not mkstemp, whose 0600 would lock out the people a file is shared with
            if target.exists():
                shutil.copymode(target, temporary)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # KeyboardInterrupt too
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise
