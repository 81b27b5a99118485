"""Build the wheel, install it in a clean environment beside the newest fastai and fastcore, use it from elsewhere.

Torch and the other large packages keep the pins of constraints.txt, so that nothing large is downloaded twice.
"""

import argparse
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from common import LIB, ROOT, Failed, python_files, run, tail, tool

ENV = ROOT / ".venv-wheel"  # beside .venv: its files can be links into the same download cache
FREE = r"^(fast\w+|python-fasthtml|nbdev|execnb|ghapi|apswutils|lightly|plum-dispatch)=="  # not held at the pins


def step(what, args, **kw):
    done = run(args, env={"PYTHONPATH": ""}, **kw)
    if done.returncode:
        raise Failed(f"{what} failed:\n{tail(done.stdout, 50)}")
    return done.stdout


def build(out):
    "The sdist, and the wheel from it (what one lacks, the other lacks). Built in a copy, free of old build/."
    copy = out / "tree"
    shutil.copytree(
        ROOT,
        copy,
        ignore=lambda folder, names: [
            n
            for n in names
            if n in {".git", "build", "dist", "runs", "demo_out", "_docs", "_proc"}
            or n.startswith(".venv")
            or n.endswith(".egg-info")
            or n == "__pycache__"
        ],
    )
    step("building the wheel", [sys.executable, "-m", "build", "--no-isolation", "--outdir", out / "dist", copy])
    wheels = list((out / "dist").glob("*.whl"))
    if len(wheels) != 1:
        raise Failed(f"one wheel expected, got {[w.name for w in wheels]}")
    return wheels[0]


def check_contents(wheel):
    "Every Python file of the library, nothing else, licence and entry point."
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    packed = {n.removeprefix("rs_selfsup/") for n in names if n.startswith("rs_selfsup/")}
    if missing := sorted(set(python_files(LIB)) - packed):
        raise Failed(
            "the wheel lacks\n"
            + "\n".join(f"  rs_selfsup/{n}" for n in missing)
            + "\n(a folder without __init__.py is not packed: run `make export`)"
        )
    recipes = {f"data_recipes/{p.name}" for p in (ROOT / "data_recipes").glob("*.yaml")}
    if missing := sorted(recipes - packed):
        raise Failed("the wheel lacks recipes: " + ", ".join(missing))
    if strangers := sorted(n for n in names if not n.startswith("rs_selfsup/") and ".dist-info/" not in n):
        raise Failed("the wheel holds what does not belong in it: " + ", ".join(strangers[:8]))
    for wanted in ("entry_points.txt", "licenses/LICENSE"):
        if not any(n.endswith(".dist-info/" + wanted) for n in names):
            raise Failed(f"the wheel lacks its {wanted}")
    return len(packed)


def install(wheel, tmp):
    "A clean environment with the wheel, the newest fastai and fastcore, and everything else as pinned."
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    held = tmp / "held.txt"
    held.write_text("\n".join(p for p in pins if not re.match(FREE, p)) + "\n")
    uv = tool("uv")
    step("making the environment", [uv, "venv", "--quiet", "--clear", "--python", sys.executable, ENV])
    python = ENV / "bin" / "python"
    step(
        "installing the wheel with the newest fastai and fastcore",
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            python,
            "-c",
            held,
            "--upgrade-package",
            "fastai",
            "--upgrade-package",
            "fastcore",
            wheel,
            "fastai",
            "fastcore",
        ],
        cwd=tmp,
    )
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-only", action="store_true", help="build and look inside, do not install")
    parser.add_argument("--keep", action="store_true", help="leave .venv-wheel")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as tmp:
            tmp = Path(tmp)
            wheel = build(tmp)
            count = check_contents(wheel)
            if args.build_only:
                return print(f"{wheel.name}: {count} files")
            python = install(wheel, tmp)
            away = tmp / "elsewhere"
            away.mkdir()
            shutil.copy(ROOT / "scripts" / "smoke.py", away)
            print(step("the smoke run", [python, "-I", "smoke.py", ROOT], cwd=away).strip())
    except Failed as e:
        sys.exit(f"wheel: {e}")
    finally:
        if not args.keep:
            shutil.rmtree(ENV, ignore_errors=True)


if __name__ == "__main__":
    main()
