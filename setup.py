"Everything that describes the package stands in settings.ini; this file only hands it to setuptools."

import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

statuses = [
    "",
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
    "6 - Mature",
    "7 - Inactive",
]
newest = 14  # the newest Python 3 that constraints.txt was resolved for
pythons = range(int(cfg["min_python"].split(".")[1]), newest + 1)
extras = {k.removeprefix("extra_"): shlex.split(cfg[k]) for k in cfg if k.startswith("extra_")}
extras["all"] = sorted({r for rs in extras.values() for r in rs})
extras["dev"] = shlex.split(cfg["dev_requirements"])
readme = HERE / "README.md"



class BuildWithRecipes(build_py):
    "The data recipes lie beside the package in the tree, and inside it in the wheel."

    def run(self):
        super().run()
        if not self.editable_mode:
            out = Path(self.build_lib) / cfg["lib_name"] / "data_recipes"
            out.mkdir(parents=True, exist_ok=True)
            for path in (HERE / "data_recipes").glob("*.yaml"):
                shutil.copy(path, out)


setup(
    cmdclass={"build_py": BuildWithRecipes},
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Source": cfg["git_url"],
        "Issues": cfg["git_url"] + "/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status'])]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        *[f"Programming Language :: Python :: 3.{v}" for v in pythons],
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: GIS",
    ],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    include_package_data=False,
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    python_requires=">=" + cfg["min_python"],
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],  # lets other nbdev projects link to our symbols
    },
    zip_safe=False,
)
