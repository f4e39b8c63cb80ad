"""Small file systems of a test's own, to be full or read-only; root has the right to write anywhere else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


class Disk:
    """A tmpfs at `path`, until `unmount`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def mount(cls, path: Path, options: str) -> Disk | None:
        """Make the directory and mount a tmpfs there; None where that is not allowed."""
        path.mkdir(parents=True)
        if shutil.which("mount") is None:
            return None
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True)
        return None if done.returncode else cls(path)

    def remount(self, options: str) -> None:
        """Change its size, or `ro` and `rw`."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def unmount(self) -> None:
        """Take it away, with all that is in it."""
        subprocess.run(["umount", "-l", str(self.path)], check=True)
