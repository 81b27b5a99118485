"The package as a whole: one version, requirements that hold, imports that are declared, links and names in the README."

import ast
import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "rs_selfsup"
IMPORT_NAMES = {
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
BROUGHT_ALONG = {
    "pillow": "matplotlib",
    "scipy": "scikit-learn",
    "pyproj": "rioxarray",
    "affine": "rasterio",
    "fastprogress": "fastai",
}


def config():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def name_of(requirement):
    return re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def modules():
    return sorted(p for p in LIB.rglob("*.py") if p.name != "_modidx.py")


def imports(path, top_only):
    "Third-party packages that a module imports: (at import time only, or anywhere)."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return {n for n in found if n not in sys.stdlib_module_names and n != "rs_selfsup"}


def distribution(module):
    return IMPORT_NAMES.get(module, module).lower().replace("_", "-")


def test_one_version():
    import rs_selfsup

    assert rs_selfsup.__version__ == config()["version"]
    assert f"version: {config()['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {config()['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_are_plain_pins_and_hold_every_requirement():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+", line) for line in lines)
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    cfg = config()
    wanted = [r for k in cfg if k.endswith("requirements") or k.startswith("extra_") for r in shlex.split(cfg[k])]
    from packaging.requirements import Requirement

    for requirement in map(Requirement, wanted):
        assert requirement.name.lower() in pins, f"{requirement.name}: run make constraints"
        assert requirement.specifier.contains(pins[requirement.name.lower()], prereleases=True), requirement


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_are_declared(path):
    cfg = config()
    core = {name_of(r) for r in shlex.split(cfg["requirements"])}
    extras = {name_of(r) for k in cfg if k.startswith("extra_") for r in shlex.split(cfg[k])}
    brought = {name for name, by in BROUGHT_ALONG.items() if by in core}
    top = {distribution(m) for m in imports(path, top_only=True)}
    everywhere = {distribution(m) for m in imports(path, top_only=False)}
    assert not top & {"nbdev", "lightly", "execnb"}, "a tool of the developers"
    assert top <= core | brought, f"imported at once, but not a requirement: {sorted(top - core - brought)}"
    assert everywhere <= core | brought | extras, (
        f"not declared in settings.ini: {sorted(everywhere - core - brought - extras)}"
    )


def test_nothing_but_settings_knows_the_address():
    "The repository's address is one value in settings.ini. (_modidx.py repeats it, made by nbdev.)"
    address = f"{config()['user']}/{config()['repo']}"
    tracked = [
        p
        for pattern in ("*.*", ".github/**/*", "scripts/*", "tests/*.py", "nbs/**/*.ipynb", "rs_selfsup/**/*.py")
        for p in ROOT.glob(pattern)
        if p.is_file() and p.name != "_modidx.py"
    ]
    hits = [p for p in tracked if p.suffix != ".pyc" and address in p.read_text(encoding="utf-8", errors="ignore")]
    assert not hits


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]
    assert targets and all((ROOT / t).exists() for t in targets), [t for t in targets if not (ROOT / t).exists()]


def test_names_of_the_readme_exist():
    "What the README tells people to import is there, and every command it shows is known."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = pytest.importorskip(node.module, reason="not in this version yet")
                assert all(hasattr(module, a.name) for a in node.names), node.module


def test_command_is_installed_and_explains_itself():
    program = Path(sys.executable).parent / "rs-selfsup"
    if not (LIB / "cli.py").exists():
        pytest.skip("no command line yet")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in set(re.findall(r"^rs-selfsup (\w+)", text, re.M)):
        assert command in done.stdout


def test_import_is_silent_and_light():
    "Importing the package and its modalities takes neither torch nor a second, and prints nothing."
    code = "import rs_selfsup, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "False\n" and done.stderr == ""


def test_an_old_python_is_told_so_in_one_line(tmp_path):
    "make_env.py must parse and speak under a Python that is too old: checked by pretending to be one."
    code = (
        "import sys, runpy; sys.version_info = (3, 9, 0, 'final', 0); sys.argv = ['make_env.py', sys.argv[1]]; "
        "runpy.run_path(sys.argv[0] and 'scripts/make_env.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "env")], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "3.9 is too old" in done.stderr and "3.11 or newer" in done.stderr
    assert not (tmp_path / "env").exists()


def test_too_little_disk_is_said_in_one_line(tmp_path):
    import os

    done = subprocess.run(
        [sys.executable, "scripts/make_env.py", str(tmp_path / "env")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "RS_SELFSUP_NEED_GB": "1e9"},
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "GB free" in done.stderr
    assert not (tmp_path / "env").exists()


def test_a_python_without_ensurepip_is_told_what_to_install(tmp_path):
    import os

    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "scripts/make_env.py", str(tmp_path / "env")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "-venv" in done.stderr
