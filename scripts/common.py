"What the scripts share: where the repository is, its settings, and how a check fails."

import configparser
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "rs_selfsup"
SKIP_DIRS = {"__pycache__", ".ipynb_checkpoints"}


class Failed(Exception):
    "A check failed; the message says what is wrong and how to mend it."


def settings():
    "settings.ini, with its addresses put together."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def notebooks(path=NBS):
    "Every notebook that nbdev sees, sorted."
    found = [p for p in Path(path).rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(path).parts)]
    return sorted(found)


def python_files(path):
    "Relative path -> text of every Python file below `path`."
    files = (p for p in Path(path).rglob("*.py") if not SKIP_DIRS & set(p.parts))
    return {p.relative_to(path).as_posix(): p.read_text(encoding="utf-8") for p in sorted(files)}


def run(args, cwd=ROOT, env=None, **kw):
    "Run a program with the repository's own package first on the path; returns the finished process with its output."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", **(env or {})}
    env.pop("IN_TEST", None)
    return subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kw,
    )


def tool(name):
    "A program of the environment this script runs in."
    return Path(sys.executable).parent / name


def tail(text, lines=60):
    "The last lines of a long output."
    kept = text.rstrip().splitlines()
    return "\n".join((["[...]"] if len(kept) > lines else []) + kept[-lines:])
