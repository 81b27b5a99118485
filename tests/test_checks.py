"""Each check of `make test` can fail: a fault is planted in a copy of the repository, and the check must find it.

Slow: RS_SELFSUP_SLOW=1 python -m pytest tests/test_checks.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LINK = re.compile(r"\[([^\]\"\n]*)\]\(([\w./]+\.ipynb)\)")  # to a notebook
BOOKS = ["00_modalities.ipynb", "30_losses.core.ipynb", "index.ipynb"]  # enough to be a library, few enough to be quick


@pytest.fixture
def copy(tmp_path):
    "A small copy of the repository: a few notebooks, the modules they export, all scripts."
    repo = tmp_path / "repo"
    skip = shutil.ignore_patterns(
        ".git", ".venv*", "_proc", "_docs", "__pycache__", "*.egg-info", "runs", "demo_out", "*.ipynb", "*.py"
    )
    shutil.copytree(ROOT, repo, ignore=skip)
    for folder in ("scripts",):
        shutil.copytree(ROOT / folder, repo / folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, repo / name)
    for name in BOOKS:
        shutil.copy(ROOT / "nbs" / name, repo / "nbs" / name)
    (repo / "rs_selfsup").mkdir(exist_ok=True)
    shutil.copy(ROOT / "rs_selfsup" / "__init__.py", repo / "rs_selfsup")
    edit(repo / "nbs" / "index.ipynb", lambda text: LINK.sub(lambda m: m[0] if (repo / "nbs" / m[2]).exists() else m[1], text))
    write(repo / "tests" / "test_one.py", "def test_one():\n    assert 1 + 1 == 2\n")
    tool(repo, "nbdev_export")
    tool(repo, sys.executable, "scripts/readme.py")
    return repo


def tool(repo, name, *args):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(repo)}
    subprocess.run([Path(sys.executable).parent / name, *args], cwd=repo, check=True, env=env, capture_output=True)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def edit(path, change):
    write(path, change(path.read_text(encoding="utf-8")))


def cells(path, change):
    "Change the cells of a notebook, stored as nbdev stores it."
    from execnb.nbio import read_nb, write_nb

    nb = read_nb(path)
    change(nb.cells)
    write_nb(nb, path)


def add_cell(path, source, kind="code", **more):
    from execnb.nbio import mk_cell

    def change(all_cells):
        cell = mk_cell(source, kind)
        cell["id"] = f"{len(all_cells) + 0xABC0000:08x}"
        cell["metadata"] = {}
        cell.update(more)
        all_cells.insert(len(all_cells) - 1, cell)

    cells(path, change)


def check(repo, name):
    "Exit code and output of one check."
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH") and "PYTEST" not in k}
    done = subprocess.run(
        [sys.executable, "scripts/check.py", name],
        cwd=repo,
        env=env,
        stdin=subprocess.DEVNULL,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def unclean(repo):
    "A notebook stored with an execution count and cell metadata."

    def change(text):
        nb = json.loads(text)
        code = next(c for c in nb["cells"] if c["cell_type"] == "code")
        code["execution_count"], code["metadata"] = 7, {"scrolled": True}
        return json.dumps(nb, indent=1) + "\n"

    edit(repo / "nbs" / BOOKS[0], change)


def private_path(repo):
    "An output that shows a folder of somebody's machine."
    shown = [{"output_type": "stream", "name": "stdout", "text": ["/home/somebody/data\n"]}]
    add_cell(repo / "nbs" / BOOKS[0], "print(1)", outputs=shown, execution_count=None)


def stored_error(repo):
    "An output that is an exception."
    shown = [{"output_type": "error", "ename": "E", "evalue": "e", "traceback": []}]
    add_cell(repo / "nbs" / BOOKS[0], "1/0", outputs=shown, execution_count=None)


def edited_module(repo):
    "A module edited by hand."
    edit(repo / "rs_selfsup" / "modalities.py", lambda text: text + "\nx = 1\n")


def orphan_module(repo):
    "A module whose notebook is gone."
    write(repo / "rs_selfsup" / "data" / "left_over.py", "x = 1\n")


def module_not_exported(repo):
    "A module that was never committed."
    (repo / "rs_selfsup" / "losses" / "core.py").unlink()


def stale_index(repo):
    "A _modidx.py that does not know the newest symbol."
    edit(repo / "rs_selfsup" / "_modidx.py", lambda text: text.replace("modalities.Band'", "modalities.Bnd'"))


def failing_notebook(repo):
    "A notebook whose assertion does not hold."
    add_cell(repo / "nbs" / BOOKS[0], "assert 1 == 2, 'planted'")


def no_notebooks(repo):
    "No notebook at all: nothing tested must not be a success."
    for book in (repo / "nbs").rglob("*.ipynb"):
        book.unlink()


def litter(repo):
    "A notebook that leaves a file behind."
    add_cell(repo / "nbs" / BOOKS[0], "open('left.bin', 'w').close()")


def lint_error(repo):
    "A module with a name that does not exist."
    write(repo / "rs_selfsup" / "modalities.py", "def f():\n    return undefined_name\n")


def failing_test(repo):
    "A test that fails."
    write(repo / "tests" / "test_one.py", "def test_one():\n    assert 1 + 1 == 3\n")


def no_test(repo):
    "No test at all (pytest's exit code 5)."
    (repo / "tests" / "test_one.py").unlink()


def only_skips(repo):
    "Tests that are all skipped."
    write(repo / "tests" / "test_one.py", "import pytest\n\n\ndef test_one():\n    pytest.skip('planted')\n")


def missing_subpackage(repo):
    "A folder that setuptools does not pack, since it has no __init__.py."
    (repo / "rs_selfsup" / "losses" / "__init__.py").unlink()


def broken_import(repo):
    "A module that imports only where the developers' tools are."
    edit(repo / "rs_selfsup" / "losses" / "core.py", lambda text: text + "\nimport nbdev  # planted\n")


def undeclared_tool(repo):
    "A requirement that drags nbdev in."
    edit(repo / "settings.ini", lambda text: text.replace("pyyaml tqdm", "pyyaml tqdm ghapi nbdev"))


def stale_readme(repo):
    "A README that is not what the front page gives."
    edit(repo / "README.md", lambda text: text + "\nan edit by hand\n")


def broken_link(repo):
    "A link to a notebook that is not there."
    add_cell(repo / "nbs" / BOOKS[0], "See [nothing](99_nothing.ipynb).", "markdown")


def broken_anchor(repo):
    "A link to a heading that is not there."
    add_cell(repo / "nbs" / BOOKS[0], "See [nothing](30_losses.core.ipynb#no-such-heading).", "markdown")


def outside_picture(repo):
    "A picture fetched from elsewhere."
    shown = [
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"text/html": ["<img src='https://example.org/a.png'>"]},
        }
    ]
    add_cell(repo / "nbs" / BOOKS[0], "1", outputs=shown, execution_count=None)


def bad_formula(repo):
    "Math that cannot be rendered."
    add_cell(repo / "nbs" / BOOKS[0], "The value $\\nosuchcommand{x}$.", "markdown")


def undocumentable(repo):
    "Documentation of something that is not there."
    add_cell(repo / "nbs" / BOOKS[0], "show_doc(planted_nowhere)")


def nested_link(repo):
    "a symbol within a link: nbdev makes a link of it, and Markdown knows no link within a link"
    add_cell(repo / "nbs" / BOOKS[0], "See [`Band`](30_losses.core.ipynb).", "markdown")


FAULTS = [
    ("clean", unclean, "not clean"),
    ("clean", private_path, "/home/somebody"),
    ("clean", stored_error, "stores an error"),
    ("export", edited_module, "modalities.py: differs"),
    ("export", orphan_module, "left_over.py: no notebook exports it"),
    ("export", module_not_exported, "core.py: exported by a notebook, but not there"),
    ("export", stale_index, "_modidx.py: differs"),
    ("notebooks", failing_notebook, "planted"),
    ("notebooks", no_notebooks, "no notebook was found"),
    ("notebooks", litter, "left.bin"),
    ("lint", lint_error, "undefined_name"),
    ("pytest", failing_test, "1 failed"),
    ("pytest", no_test, "found no test"),
    ("pytest", only_skips, "ran no test to its end"),
    ("wheel", missing_subpackage, "rs_selfsup/losses/"),
    ("wheel", broken_import, "rs_selfsup.losses.core does not import"),
    ("wheel", undeclared_tool, "nbdev was installed"),
    ("docs", stale_readme, "README.md is not what"),
    ("docs", broken_link, "99_nothing.ipynb"),
    ("docs", broken_anchor, "no-such-heading"),
    ("docs", outside_picture, "from elsewhere"),
    ("docs", bad_formula, "nosuchcommand"),
    ("docs", undocumentable, "planted_nowhere"),
    ("docs", nested_link, "Markdown that was not understood"),
]


@pytest.mark.parametrize("name,plant,said", FAULTS, ids=[f"{n}-{p.__name__}" for n, p, _ in FAULTS])
def test_a_planted_fault_is_found(copy, name, plant, said):
    plant(copy)
    code, text = check(copy, name)
    assert code == 1, f"{name} passed with {plant.__doc__}\n{text}"
    assert said in text, text


@pytest.mark.parametrize("name", ["clean", "export", "notebooks", "lint", "pytest", "wheel", "docs"])
def test_without_a_fault_the_check_passes(copy, name):
    code, text = check(copy, name)
    assert code == 0, text
