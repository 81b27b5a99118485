"""The checks of `make test`: python scripts/check.py [NAME ...]

Each has a name, runs alone with `make check-NAME`, and fails with a text that says what to do.
All are run even if one fails.
"""

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import LIB, NBS, ROOT, Failed, notebooks, python_files, run, settings, tail, tool

WORKERS = 2
# a path of somebody's machine: this tree, a home folder, or an absolute path into an environment or the package
PRIVATE = rf"{re.escape(str(ROOT))}\b|(?<![\w.:/-])/(root|home/\w+|Users/\w+)/[\w./-]*|(?<![\w.:/-])/[\w./-]+/(site-packages|{LIB.name}|nbs)/[\w./-]*"
summaries = []  # pytest's closing line, printed once more at the very end


def check_clean():
    "notebooks are clean: nbdev_clean has nothing to do, no error and no path of this machine in an output"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "nbs"
        shutil.copytree(NBS, copy, ignore=shutil.ignore_patterns(".*", "_*"))
        shutil.copy(ROOT / "settings.ini", tmp)
        done = run([tool("nbdev_clean"), "--fname", copy], cwd=tmp)
        if done.returncode or "Failed to clean" in done.stdout:
            raise Failed(f"nbdev_clean could not read a notebook:\n{tail(done.stdout, 20)}")
        dirty = [p for p in notebooks() if p.read_bytes() != (copy / p.relative_to(NBS)).read_bytes()]
    if dirty:
        raise Failed("these notebooks are not clean; run nbdev_clean and commit:\n" + listing(dirty))
    problems = []
    for path in notebooks():
        nb = json.loads(path.read_text(encoding="utf-8"))
        ids = [c.get("id") for c in nb["cells"]]
        if len(set(ids)) != len(ids):
            problems.append(f"{path.relative_to(ROOT)}: two cells have the same id")
        for number, cell in enumerate(nb["cells"]):
            outputs = cell.get("outputs", [])
            where = f"{path.relative_to(ROOT)}: cell {number}"
            if any(o["output_type"] == "error" for o in outputs):
                problems.append(f"{where} stores an error")
            text = json.dumps(
                [o.get("text", "") for o in outputs]
                + [v for o in outputs for k, v in o.get("data", {}).items() if not k.startswith("image")]
            )
            if found := re.search(PRIVATE, text):
                problems.append(f"{where} stores a path of somebody's machine: {found.group()}")
    if problems:
        raise Failed("stored outputs that must not be published:\n" + "\n".join("  " + p for p in problems))
    return f"{len(notebooks())} notebooks"


def check_export():
    "the library is what the notebooks export: nothing edited, missing, left over, or left out of _modidx.py"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        shutil.copytree(NBS, tmp / "nbs", ignore=shutil.ignore_patterns(".*", "_*", "*.png"))
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp)
        (tmp / "rs_selfsup").mkdir()
        if (LIB / "__init__.py").exists():
            shutil.copy(LIB / "__init__.py", tmp / "rs_selfsup")  # the only file written by hand; its version is not
        done = run([tool("nbdev_export")], cwd=tmp, env={"PYTHONPATH": str(tmp)})
        if done.returncode:
            raise Failed(f"nbdev_export failed:\n{tail(done.stdout, 30)}")
        want, have = python_files(tmp / "rs_selfsup"), python_files(LIB)
    problems = [f"  {n}: no notebook exports it. Delete it, or bring the notebook back" for n in have if n not in want]
    problems += [f"  {n}: exported by a notebook, but not there" for n in want if n not in have]
    for name in sorted(want.keys() & have.keys()):
        if want[name] != have[name]:
            diff = list(
                difflib.unified_diff(
                    want[name].splitlines(),
                    have[name].splitlines(),
                    "from the notebooks",
                    "in rs_selfsup/",
                    lineterm="",
                    n=1,
                )
            )
            problems.append(f"  {name}: differs from its notebook\n" + "\n".join("      " + line for line in diff[:12]))
    if problems:
        raise Failed(
            "rs_selfsup/ is not what the notebooks export; run `make export` and commit:\n" + "\n".join(problems)
        )
    return f"{len(want)} files"


def check_notebooks():
    "every notebook runs (nbdev_test; cells flagged slow, cuda or data are skipped)"
    found = notebooks()
    if not found:
        raise Failed("no notebook was found below nbs/: nothing was tested")
    before = files_of(NBS)
    done = run([tool("nbdev_test"), "--n_workers", WORKERS, "--timing"], env={"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise Failed(f"nbdev_test failed:\n{tail(done.stdout, 120)}")
    if "Success." not in done.stdout:
        raise Failed(f"nbdev_test did not say that it ran anything:\n{tail(done.stdout, 20)}")
    if left := sorted(files_of(NBS) - before):
        raise Failed("notebooks left files behind (write to a temporary folder instead):\n" + listing(left))
    slowest = re.findall(r"^(\S+\.ipynb): (\d+) secs$", done.stdout, re.M)[:3]
    return f"{len(found)} notebooks" + ("; slowest " + ", ".join(f"{n} {s} s" for n, s in slowest) if slowest else "")


def check_lint():
    "ruff"
    done = run([tool("ruff"), "check", "--no-cache", "--output-format", "concise", "."])
    if done.returncode:
        raise Failed(f"ruff (mend a module in its notebook):\n{tail(done.stdout, 80)}")
    return ""


def check_pytest():
    "tests/ with pytest"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    args = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        str(WORKERS),
        "--dist",
        "worksteal",
        "-q",
        "--durations",
        "5",
        "-p",
        "no:cacheprovider",
    ]
    with subprocess.Popen(
        args,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            print("  | " + line, end="", flush=True)
    closing = [
        line.strip("= \n")
        for line in lines
        if re.search(r"\b(passed|failed|error|no tests ran|skipped)\b.* in [\d.:]+", line)
    ]
    if closing:
        summaries.append(closing[-1])
    if process.returncode == 5:
        raise Failed("pytest found no test below tests/")
    if process.returncode:
        raise Failed(f"pytest ended with {process.returncode}: its report stands above")
    if not closing or not re.search(r"[1-9]\d* passed", closing[-1]):
        raise Failed("pytest ran no test to its end")
    return closing[-1]


def script(name):
    "A check of its own: another script of this folder."
    done = run([sys.executable, ROOT / "scripts" / name])
    if done.returncode:
        raise Failed(tail(done.stdout, 80))
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def check_wheel():
    "the wheel holds every subpackage, installs beside the newest fastai and fastcore, and runs away from the tree"
    return script("wheel.py")


def check_docs():
    "README.md is current, the site builds without a warning, no link is broken and nothing comes from elsewhere"
    readme = run([sys.executable, ROOT / "scripts" / "readme.py", "--check"])
    site = run([sys.executable, ROOT / "scripts" / "docs.py"])
    bad = [tail(done.stdout, 60) for done in (readme, site) if done.returncode]
    if bad:
        raise Failed("\n".join(bad))
    return script("check_site.py")


def files_of(path):
    return {p for p in path.rglob("*") if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}


def listing(paths):
    return "\n".join(f"  {Path(p).relative_to(ROOT)}" for p in paths)


CHECKS = {n.removeprefix("check_"): f for n, f in list(globals().items()) if n.startswith("check_")}


def main(names):
    if unknown := [n for n in names if n not in CHECKS]:
        sys.exit(f"unknown check {', '.join(unknown)}; there are: {', '.join(CHECKS)}")
    report, failed = [], []
    for name in names or CHECKS:
        print(f"{name}: {CHECKS[name].__doc__}", flush=True)
        start = time.time()
        try:
            note, verdict = CHECKS[name](), "ok"
        except Failed as e:
            note, verdict = "", "FAILED"
            failed.append(name)
            print("  FAILED  " + str(e).replace("\n", "\n  "), flush=True)
        report.append(f"  {name:<10} {verdict:<7}{time.time() - start:6.0f} s   {note}".rstrip())
        print(report[-1], flush=True)
    if len(report) > 1:
        print(f"\n{settings()['lib_name']} {settings()['version']}\n" + "\n".join(report))
    if failed:
        print(f"\nFAILED: {', '.join(failed)}; one alone: make check-{failed[0]}")
    for line in summaries:
        print(f"===== {line} =====")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
