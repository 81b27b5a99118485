"""Build the documentation site into _docs: python scripts/docs.py

nbdev processes the notebooks (hidden cells go, names become links), this script turns the
results into Markdown with their stored outputs, adds API pages, and MkDocs makes the site. Every warning is an error.
The datasets have a page each, made from their recipes, with a picture that is drawn here.
"""

import ast
import base64
import functools
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from importlib import resources

import docs_symbols
import yaml
from common import LIB, NBS, ROOT, notebooks, run, settings, tail

PROC = ROOT / "_proc"  # nbdev's cache of processed notebooks
PAGES = PROC / "_mkdocs"  # the Markdown that MkDocs reads
DECADES = [
    (0, 19, "Modalities and data"),
    (20, 29, "Masking"),
    (30, 39, "Losses"),
    (40, 59, "Encoders and methods"),
    (60, 61, "Training"),
    (62, 69, "Evaluation and export"),
    (70, 84, "Downstream tasks"),
    (85, 89, "Whole scenes"),
    (90, 99, "Command line and recipes"),
]
RECIPES = ROOT / "data_recipes"
ABOUT = {"CONTRIBUTING.md": "about/contributing.md", "CHANGELOG.md": "about/changelog.md"}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))(\{target=[^}]*\})?")

TWICE = re.compile(r"\[\[([^\[\]]+)\]\([^()\s]+\)\]\(")  # a symbol that nbdev linked inside a link of the author's

NOT_LINKED = {"rgb", "rank", "probe", "finetune", "label_fraction"}  # also a modality, a loss' rank, modes, a parameter: linked on their own page alone

SHOWN = {}  # page -> the symbols that `show_doc` shows on it, as anchors


# -- names --------------------
def page_of(path):
    "nbs/tutorials/11_data.tiles.ipynb -> tutorials/data.tiles.md: nbdev's own rule, so its links hold."
    rel = path.relative_to(NBS)
    return rel.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", rel.name.lower()).removesuffix(".ipynb") + ".md").as_posix()


def relative(target, page):
    "Path of page `target` as page `page` must write it."
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def relink(text, page, folder, cfg, pages):
    "Links to notebooks, nbdev's pages and files of the repository, as this page must write them. Code is left alone."
    site = cfg["doc_host"] + cfg["doc_baseurl"] + "/"

    def one(match):
        before, target, after, _ = match.groups()
        if target.startswith(site):
            name, _, anchor = target.removeprefix(site).partition("#")
            name = re.sub(r"\.html$", ".md", name) or "index.md"
            if anchor.rpartition(".")[2].startswith("_") and not anchor.endswith("__"):
                return before.lstrip("[").removesuffix(
                    "]("
                )  # nbdev's index knows private names, the pages do not show them
            own = page.removeprefix("api/")
            if anchor in SHOWN.get(own, set()):  # nbdev takes the first module that has the name, a page means its own
                name = own
            if anchor in NOT_LINKED and name != own:
                return before.lstrip("[").removesuffix("](")
            shown = SHOWN.get(name, set())
            anchor = next((a for a in (anchor, anchor.partition(".")[0]) if a in shown), "")
            return before + relative(name, page) + ("#" + anchor if anchor else "") + after
        if re.match(r"[a-z]+:|#|/", target):
            return before + target + after
        name, _, anchor = target.partition("#")
        name = re.sub(r"\.html$", ".ipynb", name)
        place = posixpath.normpath(posixpath.join(folder, name))  # from the top of the repository
        tail_ = "#" + anchor if anchor else ""
        if place in pages:
            return before + relative(pages[place], page) + tail_ + after
        if (ROOT / place).is_file() and place.startswith(NBS.name + "/"):
            copy = PAGES / posixpath.relpath(place, NBS.name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / place, copy)
            return before + relative(posixpath.relpath(place, NBS.name), page) + tail_ + after
        if (ROOT / place).exists():
            kind = "tree" if (ROOT / place).is_dir() else "blob"
            return f"{before}{cfg['git_url']}/{kind}/{cfg['branch']}/{place}{tail_}{after}"
        return match.group()  # MkDocs will complain, naming the page

    return outside_code(text, lambda part: LINK.sub(one, TWICE.sub(r"[\1](", part)))


def outside_code(text, change):
    "Apply `change` to the lines of Markdown that are not in a fence."
    out, fence = [], None
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if fence:
            fence = None if mark and mark.group(1).startswith(fence) else fence
        elif mark:
            fence = mark.group(1)
        else:
            line = change(line)
        out.append(line)
    return "\n".join(out)


# -- one notebook --------------------
def fence(text, info):
    ticks = "`" * max(3, 1 + max((len(m) for m in re.findall(r"`{3,}", text)), default=2))
    return f"{ticks}{info}\n{text.rstrip()}\n{ticks}"


def joined(text):
    return text if isinstance(text, str) else "".join(text or [])


def output_markdown(output, page, picture):
    "One stored output. `picture(bytes, suffix)` saves an image and returns its link."
    kind = output["output_type"]
    if kind == "stream":
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", joined(output["text"]))
        return fence(text, "{ .text .nb-output }") if text.strip() else ""
    if kind == "error":
        return fence(joined(output.get("traceback") or output.get("evalue")), "{ .text .nb-output }")
    data = output.get("data", {})
    for mime, suffix in (("image/png", "png"), ("image/jpeg", "jpg")):
        if mime in data:
            return picture(base64.b64decode(joined(data[mime])), suffix)
    if "image/svg+xml" in data:
        return picture(joined(data["image/svg+xml"]).encode(), "svg")
    if "text/markdown" in data:
        return joined(data["text/markdown"])
    if "text/html" in data:
        body = re.sub(r"\n\s*\n", "\n", joined(data["text/html"]).strip())
        return f'<div class="nb-output nb-html">\n{body}\n</div>'
    if "text/latex" in data:
        return "$$\n" + joined(data["text/latex"]).strip().strip("$").strip() + "\n$$"
    text = joined(data.get("text/plain"))
    return fence(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text), "{ .text .nb-output }") if text.strip() else ""


def module_symbols(cfg):
    "Module file, from the top of the repository -> its symbols; classes know the parameters of their bases."
    found = {f.relative_to(ROOT).as_posix(): docs_symbols.symbols(f.read_text(encoding="utf-8")) for f in sorted(LIB.rglob("*.py"))}
    docs_symbols.inherit({s.name: s for module in found.values() for s in module.values()})
    return found


def exported_to(cells):
    "The module file that a notebook writes, or None."
    for cell in cells:
        if m := re.search(r"^#\|\s*default_exp\s+(\S+)", joined(cell["source"]), re.M):
            return f"{LIB.name}/{m[1].replace('.', '/')}.py"


def shown_here(cell, module):
    "The public symbols that an exported cell defines itself, as its module has them."
    source = joined(cell["source"])
    if cell["cell_type"] != "code" or not re.search(r"^#\|\s*exports?\b", source, re.M):
        return []
    names = [s.name for s in docs_symbols.symbols(source).values() if not s.member]
    public = [n for n in names if all(part[0] != "_" or part == "__call__" for part in n.split("."))]
    return [module[n] for n in public if n in module]


def entry(s, file, cfg, level, title=None):
    "Markdown of one symbol."
    title = api_heading("#" * level, title or s.name)
    return docs_symbols.markdown(s, title, f"{cfg['git_url']}/blob/{cfg['branch']}/{file}#L{s.line}", linkify())


@functools.cache
def linkify():
    "nbdev's own rule: `name` in backticks becomes a link to the page that shows it."
    from nbdev.doclinks import NbdevLookup

    return NbdevLookup().linkify


def only_imports(code):
    try:
        return all(isinstance(n, ast.Import | ast.ImportFrom | ast.Expr) for n in ast.parse(code).body)
    except SyntaxError:
        return False


def page_markdown(path, cfg, pages, modules):
    """The page of one notebook, in the notebook's order.

    A cell that nbdev kept comes as nbdev left it, an exported one as the docments of what it defines, and its source.
    """
    page, folder = page_of(path), path.parent.relative_to(ROOT).as_posix()
    original = json.loads(path.read_text(encoding="utf-8"))["cells"]
    processed = json.loads((PROC / path.relative_to(NBS)).read_text(encoding="utf-8"))["cells"]
    kept = {c["id"]: c for c in processed if "id" in c and c.get("source") is not None}
    file = exported_to(original)
    parts, pictures, heading = [], 0, ""

    def picture(content, suffix):
        nonlocal pictures
        pictures += 1
        name = f"{page.removesuffix('.md')}_files/{pictures}.{suffix}"
        (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / name).write_bytes(content)
        alt = re.sub(r"[\[\]`*$\\]", "", heading)
        return f"![{alt}: picture {pictures}]({relative(name, page)}){{ .nb-picture loading=lazy }}"

    def outputs(cell):
        return [output_markdown(o, page, picture) for o in cell.get("outputs", [])]

    def put(*texts):
        parts.extend(relink(t, page, folder, cfg, pages) for t in texts if t)

    for cell in original:
        source, now = joined(cell["source"]), kept.get(cell.get("id"))
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if cell["cell_type"] == "markdown":
            titles = re.findall(r"^#+\s+(.*)$", source, re.M)
            if not heading and titles:  # nbdev turns the title cell into front matter
                source = re.sub(r"^>\s*(.+)$", r"\1\n{ .nb-subtitle }", source, count=1, flags=re.M)
                put(source)
            elif now:
                put(joined(now["source"]))
            heading = titles[-1] if titles else heading
        elif cell["cell_type"] != "code" or re.search(r"^#\|\s*(hide|default_exp)\b", source, re.M):
            continue
        elif re.search(r"^#\|\s*exports?\b", source, re.M):
            here = shown_here(cell, modules.get(file, {}))
            put(*(entry(one, file, cfg, 4 if "." in one.name else 3) for one in here))
            names = docs_symbols.symbols(code)
            if here or (names and all(n.rpartition(".")[2].startswith("_") for n in names)):
                unfolded = fence(code, "python").splitlines()
                put('??? quote "Source"\n\n' + "\n".join("    " + line for line in unfolded))
            elif code and not only_imports(code):
                put(fence(code, "python"))
        elif now:
            if not re.search(r"^#\|\s*(echo:\s*false|hide_input)", joined(now["source"]), re.M):
                put(fence(re.sub(r"^#\|.*\n?", "", joined(now["source"]), flags=re.M).strip(), "python"))
            put(*outputs(now))
    return "\n\n".join(parts) + "\n"


# -- API pages --------------------
HOOK = re.compile(r"\.(before|after)_\w+$")  # of a callback: fastai calls them


def api_pages(cfg, pages, modules):
    "A page per module: what it exports, with docments and the notebook that explains it. Returns navigation."
    import importlib

    nav, lines = [], ["# API", "", "The modules and the first of their names; each page has them all. The notebooks explain and test them.", ""]
    for file, found in modules.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        head = re.search(r"^# %% (\S+\.ipynb) #", source, re.M)
        if posixpath.basename(file).startswith("_") or not head:
            continue
        module = file.removesuffix(".py").replace("/", ".")
        book = ((ROOT / file).parent / head[1]).resolve()
        mod = importlib.import_module(module)
        page = f"api/{module.removeprefix(cfg['lib_name'] + '.')}.md"
        about = joined(mod.__doc__).strip().splitlines()[0] if mod.__doc__ else ""
        text = [f"# `{module}`", about]
        if book.exists():
            text.append(f"Explained and tested in [{book.name}]({relative(page_of(book), page)}).")
        names = list(getattr(mod, "__all__", []))
        for name in (n for n in names if n in found):
            text.append(entry(found[name], file, cfg, 2))
            members = [s for n, s in found.items() if n.startswith(name + ".") and (n.rpartition(".")[2][0] != "_" or n.endswith("__call__"))]
            text += [entry(s, file, cfg, 3) for s in members if s.doc or s.note or not HOOK.search(s.name)]
        values = list(constants([n for n in names if n not in found], mod, source))
        if values:
            text += ["## Values", "\n".join(["| | value | |", "|---|---|---|", *values])]
        write(page, relink("\n\n".join(text) + "\n", page, "nbs", cfg, pages))
        nav.append({page.removeprefix("api/").removesuffix(".md"): page})
        shown = ", ".join(f"`{n}`" for n in names[:8]) + (", …" if len(names) > 8 else "")
        lines.append(f"- [`{module}`]({relative(page, 'api/index.md')}): {about.rstrip('.')}. {shown}")
    write("api/index.md", "\n".join(lines) + "\n")
    return ["api/index.md", *nav]


def constants(names, mod, source):
    "A row per value: all keys of a dictionary, what else there is in brief, and the comment beside it."
    for name in names:
        value, said = getattr(mod, name), re.search(rf"^{name}\s*=[^#\n]*#\s*(.+)$", source, re.M)
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            text = "keys: " + ", ".join(docs_symbols.code(k) for k in value)
        else:
            text = re.sub(r" at 0x[0-9a-f]+", "", repr(value)).replace("\n", " ")
            text = docs_symbols.code(text[:200] + ("…" if len(text) > 200 else ""))
        yield f"| `{name}` | {text} | {docs_symbols.prose(said[1]) if said else ''} |"


def api_heading(marks, name):
    "A symbol's heading with its name as anchor; the underscores of __iter__ are no emphasis, and such an anchor cannot be written."
    if "__" in name:
        return f"{marks} {name.replace('_', chr(92) + '_')} {{ .api }}"
    return f"{marks} {name} {{ #{name.lower()} .api }}"


# -- datasets --------------------
DATASETS = """# Datasets

What the package knows of public datasets: terms, files, bands, classes, splits. `rs-selfsup data list` shows the names for the command line,
`rs-selfsup data prepare` makes a tile store of the files ([how recipes work]({recipes})). Terms and facts are as they were read when a recipe
was written; **unverified** counts what nobody could check, each page names it. A dataset that serves several tasks stands in several tables.
Sensors and GSD are those of its first layout. "-" under classes: the recipe lists no classes for this task.
The recipes are YAML files in [data_recipes]({folder}).

"""
CAPTION = (
    "Generated picture in the layout of {title}, not its imagery: files with the names, bands, data types and codes of the dataset, "
    "written and read by [recipe_examples]({examples})."
)


def dataset_pages(cfg, pages):
    "A page per recipe and the tables of all. Returns navigation."
    sys.path.insert(0, str(ROOT))
    os.environ["MPLBACKEND"] = "agg"
    from rs_selfsup.recipes import list_recipes, recipe_index, recipe_page

    recipes = sorted(list_recipes(), key=lambda r: r.title.lower())
    files = f"{cfg['git_url']}/blob/{cfg['branch']}/{RECIPES.name}"
    for r in recipes:
        page = pages[f"{RECIPES.name}/{r.name}.yaml"]
        text = recipe_page(r, web=True, picture=dataset_picture(r, page))
        write(page, f"{text}\nMade from [{r.name}.yaml]({files}/{r.name}.yaml).\n")
    index = pages[RECIPES.name]
    here = lambda name: relative(page_of(NBS / name), index)
    text = DATASETS.format(recipes=here("16_recipes.ipynb"), folder=files.replace("/blob/", "/tree/"))
    write(index, text + recipe_index(recipes, lambda r: f"{r.name}.md"))
    return [index, *({r.title: pages[f"{RECIPES.name}/{r.name}.yaml"]} for r in recipes)]


def dataset_picture(r, page):
    "Draw the example of the richest layout; returns Markdown, '' for a dataset that is described file by file."
    import matplotlib.pyplot as plt

    from rs_selfsup.recipe_examples import show_example

    shown = [k for k, block in r.scenes.items() if "example" in block]
    if not shown:
        return ""
    layout = max(shown, key=lambda k: len(r.scenes[k]["modalities"]))
    fig = show_example(r, layout)
    (PAGES / page).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig((PAGES / page).with_suffix(".png"), metadata={"Software": None})
    plt.close(fig)
    masks = any(t["kind"] == "mask" for t in (r.scenes[layout].get("targets") or {}).values())
    caption = CAPTION.format(title=r.title, examples=relative(page_of(NBS / "17_recipe_examples.ipynb"), page))
    caption += " The last row of a mask holds all codes in turn." * masks + f" Layout: `{layout}`." * (len(r.scenes) > 1)
    return f"![Generated picture in the layout of {r.title}]({r.name}.png){{ .nb-picture }}\n\n{caption}\n{{ .caption }}"


# -- the site --------------------
def title_of(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown" and (m := re.search(r"^#\s+(.*?)\s*$", joined(cell["source"]), re.M)):
            return re.sub(r"[`*]", "", m[1])
    return path.stem


def navigation(books, api, datasets):
    "Start, tutorials, the notebooks by decade, datasets, experiments, API, about."
    top = [b for b in books if b.parent == NBS and b.name != "index.ipynb"]
    entry = lambda b: {title_of(b): page_of(b)}
    folder = lambda name: [entry(b) for b in books if NBS / name in b.parents]
    number = lambda b: int(m[0]) if (m := re.match(r"\d+", b.name)) else 99
    nav = [{"Start": "index.md"}, {"Tutorials": folder("tutorials")}]
    nav += [{title: [entry(b) for b in top if lo <= number(b) <= hi]} for lo, hi, title in DECADES]
    known = {"tutorials", "experiments"}
    others = sorted({b.relative_to(NBS).parts[0] for b in books if b.parent != NBS} - known)
    nav += [{name.capitalize(): folder(name)} for name in others]
    nav += [
        {"Datasets": datasets},
        {"Experiments": folder("experiments")},
        {"API": [api[0], {"Modules": api[1:]}]},
        {"About": [{"Contributing": "about/contributing.md"}, {"Changes": "about/changelog.md"}]},
    ]
    return [n for n in nav if all(n.values())]


def write(page, text):
    path = PAGES / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def process_notebooks(books):
    "nbdev's processing, in a process of its own: notebooks -> _proc/."
    names = [b.relative_to(ROOT) for b in books]
    done = run([sys.executable, ROOT / "scripts" / "docs_process.py", PROC, *names], env={"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"docs: nbdev could not process the notebooks:\n{tail(done.stdout, 40)}")


def math_font():
    "STIX Two Math (OFL) from the package ziamath, cut down to what formulas use: MathML needs a font made for it."
    from fontTools import subset, ttLib

    options = subset.Options(
        layout_features=["ssty", "dtls", "flac", "ccmp", "mark", "mkmk"],
        hinting=False,
        name_IDs=["*"],
        notdef_outline=True,
        flavor="woff",
    )
    font = ttLib.TTFont(resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")
    wanted = subset.Subsetter(options)
    blocks = [(0x20, 0x250), (0x2B0, 0x3FF), (0x2000, 0x2BFF), (0x1D400, 0x1D7FF)]
    wanted.populate(unicodes=[u for lo, hi in blocks for u in range(lo, hi + 1)])
    wanted.subset(font)
    subset.save_font(font, PAGES / "assets" / "math.woff", options)


def main():
    cfg, books = settings(), notebooks()
    if not any(b.name == cfg["readme_nb"] for b in books):
        sys.exit("docs: nbs/index.ipynb is missing")
    process_notebooks(books)
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = {b.relative_to(ROOT).as_posix(): page_of(b) for b in books} | ABOUT | {RECIPES.name: "datasets/index.md"}
    pages |= {f"{RECIPES.name}/{p.name}": f"datasets/{p.stem}.md" for p in sorted(RECIPES.glob("*.yaml"))}
    if len(set(pages.values())) != len(pages):
        sys.exit("docs: two notebooks would be the same page (names differ in their number only)")
    for source, page in ABOUT.items():
        write(page, relink((ROOT / source).read_text(encoding="utf-8"), page, "", cfg, pages))
    modules = module_symbols(cfg)
    for book in books:
        cells = json.loads(book.read_text(encoding="utf-8"))["cells"]
        found = modules.get(exported_to(cells), {})
        SHOWN[page_of(book)] = {s.name.lower() for c in cells for s in shown_here(c, found)}
    for book in books:
        write(page_of(book), page_markdown(book, cfg, pages, modules))
    api = api_pages(cfg, pages, modules)
    datasets = dataset_pages(cfg, pages)
    write("assets/site.css", (ROOT / "scripts" / "site.css").read_text(encoding="utf-8"))
    math_font()
    config = {
        "INHERIT": "../mkdocs.yml",
        "site_name": cfg["title"],
        "site_description": cfg["description"],
        "site_url": cfg["doc_host"] + cfg["doc_baseurl"] + "/",
        "copyright": f"© {cfg['copyright']}, Apache-2.0",
        "docs_dir": "_mkdocs",
        "site_dir": str(ROOT / cfg["doc_path"]),
        "hooks": [str(ROOT / "scripts" / "docs_hooks.py")],
        "nav": navigation(books, api, datasets),
        "extra": {"social": [{"icon": "fontawesome/brands/git-alt", "link": cfg["git_url"], "name": "Repository"}]},
    }
    (PROC / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "-f", PROC / "mkdocs.yml"],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode or "WARNING" in done.stdout:  # (with --quiet, --strict would count nothing)
        said = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("INFO"))
        sys.exit(f"docs: mkdocs warned (mend the notebook of that name):\n{tail(said, 60)}")
    print(f"{len(books)} notebooks, {len(api) - 1} API pages, {len(datasets) - 1} datasets")


if __name__ == "__main__":
    main()
