"""Use the installed package as a stranger would: python -I smoke.py TREE (run by scripts/wheel.py, away from the tree).

Every module is imported; neither nbdev nor lightly may be there; the command line goes the whole road on tiny data.
"""

import importlib
import importlib.metadata as metadata
import importlib.util
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "rs_selfsup"
# the road: what is called, and what must lie there afterwards
ROAD = [
    ("synth scenes --n-scenes 2 --size-m 128 --modalities rgb dsm", "scenes/scenes.yaml"),
    (
        "build scenes/scenes.yaml tiles --tile 64 --min-valid 0.1 --splits 0.5 0.25 0.25 --block 32 --buffer 0",
        "tiles/tiles.png",
    ),
    (
        "pretrain tiles run --encoder vit_tiny_patch16_224 --epochs 1 --bs 4 --workers 0 --set depth=2",
        "run/encoder.safetensors",
    ),
    ("embed run/encoder_all.safetensors tiles features.npz", "features.npz"),
    ("data show eurosat_rgb", "features.npz"),  # the recipes are inside the wheel
]


def stop(text):
    sys.exit(f"smoke: {text}")


def import_all(tree):
    package = importlib.import_module(NAME)
    where = Path(package.__file__).resolve()
    if tree in where.parents and "site-packages" not in where.parts:
        stop(f"{where} was imported, not the installed package")
    names = [NAME] + [m.name for m in pkgutil.walk_packages(package.__path__, NAME + ".", onerror=stop)]
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as e:
            stop(f"{name} does not import: {type(e).__name__}: {e}")
    return names


def travel():
    "The command line on tiny data, in a folder of its own."
    program = Path(sys.executable).parent / "rs-selfsup"
    if importlib.util.find_spec(NAME + ".cli") is None:
        return "no command line in this version"
    with tempfile.TemporaryDirectory() as tmp:
        for command, made in ROAD:
            done = subprocess.run(
                [program, *command.split()],
                cwd=tmp,
                stdin=subprocess.DEVNULL,
                text=True,
                timeout=600,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            if done.returncode:
                stop(f"rs-selfsup {command}\nended with {done.returncode}:\n{done.stdout[-3000:]}")
            if not list(Path(tmp).glob(made)):
                stop(f"rs-selfsup {command}\nleft no {made}:\n{done.stdout[-3000:]}")
    return " -> ".join(command.split()[0] for command, _ in ROAD)


def main():
    for stranger in ("nbdev", "lightly"):
        if importlib.util.find_spec(stranger):
            stop(f"{stranger} was installed with the package: a requirement drags it in")
    names = import_all(Path(sys.argv[1]).resolve())
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("fastai", "fastcore", "torch"))
    road = travel()
    print(f"{len(names)} modules imported with {versions}; {road}")


if __name__ == "__main__":
    main()
