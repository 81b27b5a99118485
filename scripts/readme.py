"""README.md from nbs/index.ipynb: python scripts/readme.py [--check]

Hidden cells are left out, and links are turned from the notebook's folder to the top of the repository.
"""

import posixpath
import re
import sys

import nbformat
from common import NBS, ROOT, settings
from nbconvert import MarkdownExporter

HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|export|exporti)\b", re.M)
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)]*)?\))")


def from_top(match):
    before, target, after = match.groups()
    if re.match(r"[a-z]+:|/", target):
        return match.group()
    return before + posixpath.normpath(posixpath.join(NBS.name, target)) + after


def readme():
    path = NBS / settings()["readme_nb"]
    nb = nbformat.read(path, as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and HIDDEN.search(c.source))]
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        sys.exit(
            f"{path.relative_to(ROOT)}: README.md shows no stored output; save the picture in nbs/images and link it"
        )
    lines, fenced = [], False
    for line in text.strip().splitlines():
        fenced ^= line.startswith("```")
        lines.append(line if fenced else LINK.sub(from_top, line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


if __name__ == "__main__":
    readme_file, text = ROOT / "README.md", readme()
    if "--check" not in sys.argv:
        readme_file.write_text(text, encoding="utf-8")
        print(f"README.md: {len(text.splitlines())} lines")
    elif not readme_file.exists() or readme_file.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb gives; run `make readme` and commit")
