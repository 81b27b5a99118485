"""Build the documentation site into _docs: python scripts/docs.py

nbdev processes the notebooks (hidden cells go, `show_doc` of every exported symbol comes), this script turns the
results into Markdown with their stored outputs, adds API pages, and MkDocs makes the site. Every warning is an error.
"""

import ast
import base64
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import resources

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
    (62, 79, "Evaluation and use"),
    (80, 99, "Command line and recipes"),
]
ABOUT = {"CONTRIBUTING.md": "about/contributing.md", "CHANGELOG.md": "about/changelog.md"}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))(\{target=[^}]*\})?")

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

    return outside_code(text, lambda part: LINK.sub(one, part))


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


SIGNATURE = re.compile(r"```python\n+(?:def|class) (\w+)\((?:\)|(.*?)\n\))(?:->(.*?))?:(?: # (.*?))?\n+```", re.S)
PARAMETER = re.compile(r"(?P<name>\*{0,2}\w+|\*|/)(?::(?P<type>.*?))?(?:=(?P<default>.*))?", re.S)
LINE = re.compile(r"\s*(?P<code>.*?),?(?: # (?P<about>.*))?")


def documented(path):
    "Symbol -> the processed cell that shows its documentation."
    cells = json.loads((PROC / path.relative_to(NBS)).read_text(encoding="utf-8"))["cells"]
    return {m[1]: c for c in cells if (m := re.search(r"^show_doc\(([\w.]+)", joined(c.get("source")), re.M))}


def told(source, name):
    """What the source says of the function or class `name` and nbdev does not: whether its documentation is its own (not a
    base class's), whether it is a property, and the comment on **kwargs, which nbdev takes for that of the result."""
    source, defs = textwrap.dedent(source), (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    try:
        node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, defs) and n.name == name)
    except (SyntaxError, StopIteration):
        return True, False, None
    made = next((n for n in ast.walk(node) if isinstance(n, defs) and n.name == "__init__"), node)
    head = "\n".join(source.splitlines()[made.lineno - 1 : made.body[0].lineno])
    kwargs = re.search(r"^[^#\n]*\*\*\w+,?\s*# ?(.+)$", head, re.M)
    prop = any(ast.unparse(d) in ("property", "patch(as_prop=True)") for d in node.decorator_list)
    return isinstance(node, ast.ClassDef) or bool(ast.get_docstring(node)), prop, kwargs and kwargs[1]


def own_lines(source, name):
    "The line of the source that each parameter of `name` (or field of a dataclass) stands on: nbdev joins lines without a comment."
    defs = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    try:
        node = next(n for n in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(n, defs) and n.name == name)
    except (SyntaxError, StopIteration):
        return {}
    if isinstance(node, ast.ClassDef):
        made = next((n for n in node.body if isinstance(n, defs) and n.name == "__init__"), None)
        if made is None:
            return {n.target.id: n.lineno for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        node = made
    return {n.arg: n.lineno for n in ast.walk(node.args) if isinstance(n, ast.arg)}


def symbol(text, source="", prop=False):
    "What nbdev's `show_doc` says of a symbol: an anchor as its index names it, and the parameters as a table."
    text = re.sub(r"^---\n+", "", text)
    text = re.sub(r"(\[source\]\([^)]*\))\{[^}]*\}", r"\1{ .nb-source-link }", text)
    text = re.sub(r"^(#+) (\S+)$", lambda m: api_heading(m[1], m[2]), text, count=1, flags=re.M)
    text = text.replace("*Call self as a function.*", "")
    if not (found := SIGNATURE.search(text)):
        return text
    own, attribute, kwargs = told(source, found[1])
    about, _, rest = text[found.end() :].strip().partition("\n\n")  # one line of documentation before the signature
    about, rest = (re.sub(r"^\*(.*)\*$", r"\1", about, flags=re.S), rest) if own else ("", "")
    shown = parameters(found, kwargs, prop or attribute, own_lines(source, found[1]))
    return "\n\n".join(t for t in (text[: found.start()].strip(), about, shown, rest) if t) + "\n"


def code_cell(text):
    "A short piece of code inside a Markdown table."
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if text else ""


def split(code):
    "The parameters on one line: at the commas outside of brackets and strings."
    depth, quote, start, out = 0, "", 0, []
    for i, c in enumerate(code):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c == "," and not depth:
            out.append(code[start:i].strip())
            start = i + 1
        else:
            depth += (c in "([{<") - (c in ")]}>")
    return [p for p in [*out, code[start:].strip()] if p]


def cell_text(text):
    "A comment inside a Markdown table: no new column, a closing {t: 3} is no list of attributes, gh*side no emphasis."
    text = re.sub(r"\|", "&#124;", text or "")
    return re.sub(r"`[^`]*`|\$[^$]*\$|[{*]", lambda m: {"{": "&#123;", "*": "&#42;"}.get(m[0], m[0]), text)


def parameters(match, kwargs=None, prop=False, at=None):
    """The signature in brief, then a table: nbdev shows the docments as comments, which get long. Parameters that share
    a line in the source share its comment, so they share a row."""
    name, body, returns, about = match.groups()
    body = re.sub(r"np\.(?:float|int)\d+\(([^()]*)\)", r"\1", body or "")  # a number, however numpy writes it
    lines = [LINE.fullmatch(line) for line in body.splitlines() if line.strip()]
    groups = [([PARAMETER.fullmatch(p) for p in split(line["code"])], line["about"]) for line in lines]
    found = [m for group, _ in groups for m in group]
    if not all(found):
        return re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", match.group())  # no links in code
    about = None if kwargs and about == kwargs else about
    brief = [m["name"] + (f"={m['default']}" if m["default"] else "") for m in found]
    head = name if prop else f"{name}({', '.join(brief)})"
    head += f" -> {returns}" if returns and returns != "None" else ""
    rows = []
    for group, text in groups:
        group = [m for m in group if m["name"] not in "*/"]
        text = text or (kwargs if group and group[-1]["name"].startswith("**") else None)
        line = (at or {}).get(group[-1]["name"].strip("*")) if group else None
        together = [m for m in group if (at or {}).get(m["name"].strip("*")) == line] if text else []
        for some in [[m] for m in group if m not in together] + [together] * bool(together):
            said = {m["type"]: "" for m in some if m["type"] not in (None, "NoneType")}  # None is only the default
            columns = [m["name"] for m in some], said, [m["default"] for m in some]
            rows.append((*(", ".join(code_cell(o) for o in column if o) for column in columns), text if some is together else None))
    if about:
        rows.append(("*returns*", code_cell(returns), "", about))
    if not any(row[3] for row in rows):
        return fence(head, "{ .python .signature }")
    lines = ["| | type | default | |", "|---|---|---|---|"]
    lines += [f"| {who} | {kind} | {default} | {cell_text(text)} |" for who, kind, default, text in rows]
    return fence(head, "{ .python .signature }") + "\n\n" + "\n".join(lines)


def defined(source):
    "Names of the functions, classes and patched methods that a cell defines."
    from nbdev.doclinks import patch_name

    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    names = [patch_name(n) for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]
    return [n for group in names for n in (group if isinstance(group, list) else [group])]


def only_imports(code):
    try:
        return all(isinstance(n, ast.Import | ast.ImportFrom | ast.Expr) for n in ast.parse(code).body)
    except SyntaxError:
        return False


def page_markdown(path, cfg, pages):
    """The page of one notebook, in the notebook's order.

    A cell that nbdev kept comes as nbdev left it, an exported one as what `show_doc` says of it, and its source.
    """
    page, folder = page_of(path), path.parent.relative_to(ROOT).as_posix()
    original = json.loads(path.read_text(encoding="utf-8"))["cells"]
    processed = json.loads((PROC / path.relative_to(NBS)).read_text(encoding="utf-8"))["cells"]
    kept = {c["id"]: c for c in processed if "id" in c and c.get("source") is not None}
    docs = documented(path)
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
            every = defined(code)
            names = [n for n in every if n in docs]
            put(*(symbol(text, code) for n in names for text in outputs(docs[n])))
            if names or (every and all(n.rpartition(".")[2].startswith("_") for n in every)):
                unfolded = fence(code, "python").splitlines()
                put('??? quote "Source"\n\n' + "\n".join("    " + line for line in unfolded))
            elif code and not only_imports(code):
                put(fence(code, "python"))
        elif now:
            by_hand = re.search(r"^show_doc\(", code, re.M)
            if not by_hand and not re.search(r"^#\|\s*(echo:\s*false|hide_input)", joined(now["source"]), re.M):
                put(fence(re.sub(r"^#\|.*\n?", "", joined(now["source"]), flags=re.M).strip(), "python"))
            put(*(symbol(t) if by_hand else t for t in outputs(now)))
    return "\n\n".join(parts) + "\n"


# -- API pages --------------------
def api_pages(cfg, pages):
    "A page per module: what it exports, with docments and the notebook that explains it. Returns navigation."
    import importlib
    import inspect

    from nbdev.showdoc import show_doc

    nav, lines = [], ["# API", "", "Every public name, by module. The notebooks explain and test them.", ""]
    for file in sorted(LIB.rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        head = re.search(r"^# %% (\S+\.ipynb) #", file.read_text(encoding="utf-8"), re.M)
        if file.name.startswith("_") or not head:
            continue
        book = (file.parent / head[1]).resolve()
        mod = importlib.import_module(module)
        page = f"api/{module.removeprefix(cfg['lib_name'] + '.')}.md"
        about = joined(mod.__doc__).strip().splitlines()[0] if mod.__doc__ else ""
        text = [f"# `{module}`", about]
        if book.exists():
            text.append(f"Explained and tested in [{book.name}]({relative(page_of(book), page)}).")
        constants, names = [], list(getattr(mod, "__all__", []))
        for name in names:
            obj = getattr(mod, name)
            if inspect.isclass(obj) or inspect.isfunction(obj):
                text.append(api_entry(show_doc(obj, title_level=2), name, obj))
                members = vars(obj).items() if inspect.isclass(obj) else []
                for m, member in members:
                    method = getattr(member, "__func__", getattr(member, "fget", member))
                    if (
                        inspect.isfunction(method)
                        and (m[0] != "_" or m == "__call__")
                        and method.__module__.startswith(cfg["lib_name"])
                    ):
                        entry = api_entry(show_doc(method, title_level=3), f"{name}.{m}", method, isinstance(member, property))
                        text.append(entry)
            else:
                value = re.sub(r" at 0x[0-9a-f]+", "", repr(obj)).replace("\n", " ")
                value = html.escape(value[:90] + ("…" if len(value) > 90 else "")).replace("|", "&#124;")
                constants.append(f"| `{name}` | {html.escape(type(obj).__name__)} | <code>{value}</code> |")
        if constants:
            text += [
                "## Values",
                "\n".join(["| name | type | value |", "|---|---|---|", *constants]),
            ]
        write(page, relink("\n\n".join(text) + "\n", page, "nbs", cfg, pages))
        nav.append({page.removeprefix("api/").removesuffix(".md"): page})
        shown = ", ".join(f"`{n}`" for n in names[:8]) + (", …" if len(names) > 8 else "")
        lines.append(f"- [`{module}`]({relative(page, 'api/index.md')}): {about.rstrip('.')}. {shown}")
    write("api/index.md", "\n".join(lines) + "\n")
    return ["api/index.md", *nav]


def api_heading(marks, name):
    "A symbol's heading with its name as anchor; the underscores of __iter__ are no emphasis, and such an anchor cannot be written."
    if "__" in name:
        return f"{marks} {name.replace('_', chr(92) + '_')} {{ .api }}"
    return f"{marks} {name} {{ #{name.lower()} .api }}"


def api_entry(shown, name, obj, prop=False):
    "What nbdev shows of one symbol, with its name in full and the first paragraphs of its documentation."
    import inspect

    try:
        source = inspect.getsource(obj)
    except (OSError, TypeError):
        source = ""
    shown = shown._repr_markdown_().replace("def <lambda>(", f"def {name.rpartition('.')[2]}(")
    text = symbol(shown, source, prop)
    return re.sub(
        r"^(#+) \S+ \{ (?:#\S+ )?\.api \}", lambda m: api_heading(m[1], name), text, count=1, flags=re.M
    )


# -- the site --------------------
def title_of(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown" and (m := re.search(r"^#\s+(.*?)\s*$", joined(cell["source"]), re.M)):
            return re.sub(r"[`*]", "", m[1])
    return path.stem


def navigation(books, api):
    "Start, tutorials, the notebooks by decade, experiments, API, about."
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
    pages = {b.relative_to(ROOT).as_posix(): page_of(b) for b in books} | ABOUT
    if len(set(pages.values())) != len(pages):
        sys.exit("docs: two notebooks would be the same page (names differ in their number only)")
    for source, page in ABOUT.items():
        write(page, relink((ROOT / source).read_text(encoding="utf-8"), page, "", cfg, pages))
    SHOWN.update({page_of(b): {name.lower() for name in documented(b)} for b in books})
    for book in books:
        write(page_of(book), page_markdown(book, cfg, pages))
    api = api_pages(cfg, pages)
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
        "nav": navigation(books, api),
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
    print(f"{len(books)} notebooks, {len(api) - 1} API pages")


if __name__ == "__main__":
    main()
