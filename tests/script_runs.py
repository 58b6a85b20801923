"""Running the project's scripts as a user does."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_script(script: str, *arguments: object, cwd: Path, stdin: str = "", code: int = 0):
    """Run a script of the repository in folder `cwd`; check its exit code, return the process."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def error_line(script: str, *arguments: object, cwd: Path, code: int = 2) -> str:
    """The one line on which a script ends when its input cannot be used."""
    done = run_script(script, *arguments, cwd=cwd, code=code)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stderr
    return lines[0]
