"""Make .venv and install the package with its development tools: python3 scripts/make_env.py .venv

Runs under any Python, so that one too old can say so. What can be wrong with a fresh machine is said in one line.
"""

import hashlib
import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
# Measured with torch's CUDA build: .venv 6.4 GB, the download cache as much again where the file system cannot link the
# two, and the same once more while the wheel is tested in an environment of its own (with links: 7 GB in all).
NEED_GB = 15
INPUTS = ["settings.ini", "setup.py", "constraints.txt", "scripts/make_env.py"]


def stop(text):
    sys.stderr.write("make: " + text + "\n")
    sys.exit(1)


def check_machine(where):
    version = "%d.%d" % sys.version_info[:2]
    if sys.version_info[:2] < OLDEST:
        stop(
            "Python %s is too old (%s): %d.%d or newer is needed. Another one: make PYTHON=python3.12"
            % ((version, sys.executable) + OLDEST)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop(
            "Python %s cannot make environments (no ensurepip): on Debian or Ubuntu run 'apt-get install python%s-venv'"
            % (version, version)
        )
    need = float(os.environ.get("RS_SELFSUP_NEED_GB", NEED_GB))
    free = shutil.disk_usage(where).free / 1e9
    if free < need:
        stop(
            "%.1f GB free on the disk of %s, %.0f GB are needed (torch). Free some, or set RS_SELFSUP_NEED_GB."
            % (free, where, need)
        )


def digest(root):
    h = hashlib.sha256(sys.version.encode())
    for name in INPUTS:
        with open(os.path.join(root, name), "rb") as f:
            h.update(f.read())
    return h.hexdigest()


def works(python):
    return os.path.exists(python) and subprocess.call([python, "-c", "import pip, ssl"], stderr=subprocess.DEVNULL) == 0


def uv_version(root):
    with open(os.path.join(root, "constraints.txt")) as f:
        return [line.strip() for line in f if line.startswith("uv==")][0]


def run(*args):
    if subprocess.call(args) != 0:
        stop("'%s' failed (its message stands above)" % " ".join(args))


def main():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.chdir(root)
    env = sys.argv[1] if len(sys.argv) > 1 else ".venv"
    python, stamp = os.path.join(env, "bin", "python"), os.path.join(env, ".installed")
    os.environ.pop("VIRTUAL_ENV", None)
    os.environ.pop("PYTHONPATH", None)
    fresh = not works(python)
    if fresh:
        check_machine(root)
        shutil.rmtree(env, ignore_errors=True)
        print("making %s with Python %d.%d" % ((env,) + sys.version_info[:2]))
        run(sys.executable, "-m", "venv", env)
    elif os.path.exists(stamp) and open(stamp).read() == digest(root):
        os.utime(stamp, None)
        return
    if os.path.exists(stamp):
        os.remove(stamp)
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", uv_version(root))
    print("installing the package and its tools%s" % (": the first time some GB are downloaded" if fresh else ""))
    sys.stdout.flush()
    run(
        os.path.join(env, "bin", "uv"),
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "-c",
        "constraints.txt",
        "-e",
        ".[dev]",
    )
    with open(stamp, "w") as f:
        f.write(digest(root))


if __name__ == "__main__":
    main()
