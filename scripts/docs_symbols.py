"""What a module says of its names, read from its source: signature, docments as a table, docstring, line.

nbdev's `show_doc` joins parameters without a comment, guesses types from defaults and loses the comments of results;
here a comment belongs to the line it stands on.
"""

import ast
import html
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass, field

NOQA = re.compile(r"noqa\b(: *[A-Z]+\d+(, *[A-Z]+\d+)*)?(\s+- )?")  # said to the linter, before what is said to the reader
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
EMPTY = {"list": "[]", "dict": "{}", "tuple": "()", "set": "set()"}


@dataclass
class Row:
    "A line of the table: one parameter, or several that share a comment."

    names: list
    types: list  # source of the annotations, '' without
    defaults: list  # source, '' without
    about: str = ""


@dataclass
class Symbol:
    name: str  # 'CMID.create'
    line: int  # of its definition
    kind: str = "function"  # or 'class', 'property'
    doc: str = ""
    rows: list = field(default_factory=list)  # of `Row`; None: as the base class has them
    marks: dict = field(default_factory=dict)  # index of a parameter -> '*' or '/' that stands before it
    returns: str = ""
    result: str = ""  # what is said of it
    note: str = ""  # comment on a definition of one line
    attributes: list = field(default_factory=list)  # of `Row`: what a class sets, with a comment
    bases: list = field(default_factory=list)
    member: bool = False  # defined in its class, not patched into it


# -- reading --------------------
class Reader:
    "The symbols of one source text."

    def __init__(self, source):
        self.source = source
        self.tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        self.comments = {t.start[0]: NOQA.sub("", t.string.lstrip("# ").rstrip()).strip() for t in tokens if t.type == tokenize.COMMENT}
        self.tokens = [t for t in tokens if t.type == tokenize.OP]

    def text(self, node):
        return "" if node is None else ast.get_source_segment(self.source, node)

    def colon(self, node):
        "The line on which the head of a function ends."
        depth = 0
        for t in self.tokens:
            if t.start[0] < node.lineno:
                continue
            depth += (t.string in "([{") - (t.string in ")]}")
            if t.string == ":" and not depth:
                return t.start[0]

    def read(self):
        "Name -> `Symbol`, in the order of the source."
        found = {}
        for node in self.tree.body:
            for s in self.classes(node) if isinstance(node, ast.ClassDef) else self.patched(node):
                found[s.name] = s
        return found

    def patched(self, node):
        "A function; one with @patch belongs to the class of its first argument."
        if not isinstance(node, FUNCTIONS):
            return
        if any(ast.unparse(d).startswith("patch") for d in node.decorator_list):
            owners = re.findall(r"\w+", self.text(node.args.args[0].annotation))
            yield from (self.function(node, f"{owner}.{node.name}", skip=1) for owner in owners)
        else:
            yield self.function(node, node.name)

    def function(self, node, name, skip=0):
        marks = [ast.unparse(d) for d in node.decorator_list]
        s = Symbol(name, node.lineno, doc=ast.get_docstring(node) or "", returns=self.text(node.returns))
        if any(m in ("property", "cached_property", "patch(as_prop=True)") for m in marks):
            s.kind = "property"
        if any(m.endswith("contextmanager") for m in marks):
            s.doc = s.doc.rstrip(".") + " (a context manager)."
        end = self.colon(node)
        self.signature(s, node.args, skip, alone=end == node.lineno)
        said = self.comments.get(end, "")
        if end == node.lineno and (not s.returns or "->" in said):
            s.note = said
        elif not any(self.last_line(a) == end for a in every(node.args)) or end == node.lineno:
            s.result = said
        return s

    @staticmethod
    def last_line(arg):
        return max(n.end_lineno for n in (arg, arg.annotation, getattr(arg, "default", None)) if n is not None)

    def signature(self, s, args, skip, alone):
        "Rows and marks; `skip`: self or cls; `alone`: the whole head is one line, whose comment is no parameter's."
        plain = args.posonlyargs + args.args
        for arg, value in zip(plain[len(plain) - len(args.defaults) :], args.defaults):
            arg.default = value
        for arg, value in zip(args.kwonlyargs, args.kw_defaults):
            arg.default = value
        shown = every(args)[skip:]
        if args.kwonlyargs and not args.vararg:
            s.marks[shown.index(args.kwonlyargs[0])] = "*"
        if args.posonlyargs:
            s.marks[len(args.posonlyargs) - skip] = "/"
        stars = {id(args.vararg): "*", id(args.kwarg): "**"}
        fields = [
            (stars.get(id(a), "") + a.arg, self.text(a.annotation), self.text(getattr(a, "default", None)), self.last_line(a))
            for a in shown
        ]
        s.rows = self.grouped(fields, {} if alone else self.comments)

    @staticmethod
    def grouped(fields, comments):
        "Parameters that share a line share its comment."
        rows, lines = [], []
        for name, kind, default, line in fields:
            if comments.get(line) and lines and lines[-1] == line:
                row = rows[-1]
                row.names.append(name), row.types.append(kind), row.defaults.append(default)
            else:
                rows.append(Row([name], [kind], [default], comments.get(line, "")))
            lines.append(line)
        return rows

    def classes(self, node):
        "A class and its public members."
        s = Symbol(node.name, node.lineno, "class", ast.get_docstring(node) or "", rows=None, bases=[self.text(b) for b in node.bases])
        body = node.body
        init = next((n for n in body if isinstance(n, FUNCTIONS) and n.name == "__init__"), None)
        if any("dataclass" in self.text(d) for d in node.decorator_list) or "NamedTuple" in s.bases:
            s.rows = self.grouped([f for n in body if isinstance(n, ast.AnnAssign) and (f := self.data_field(n))], self.comments)
        elif init:
            self.signature(s, init.args, 1, alone=self.colon(init) == init.lineno)
            s.result = "" if self.colon(init) == init.lineno else self.comments.get(self.colon(init), "")
            if self.colon(init) == init.lineno:
                s.note = self.comments.get(init.lineno, "")
        yield s
        for n in body:
            if isinstance(n, FUNCTIONS) and (n.name[0] != "_" or n.name == "__call__"):
                static = any(ast.unparse(d) == "staticmethod" for d in n.decorator_list)
                member = self.function(n, f"{node.name}.{n.name}", skip=0 if static else 1)
                member.member = True
                yield member
            elif isinstance(n, ast.Assign) and (made := self.made_property(n)):
                yield Symbol(f"{node.name}.{n.targets[0].id}", n.lineno, "property", made, member=True)
            elif isinstance(n, ast.Assign) and self.comments.get(n.end_lineno):
                targets = [self.text(t) for t in n.targets]
                if targets[0][0] != "_":
                    s.attributes.append(Row(targets, [""], [self.text(n.value)], self.comments[n.end_lineno]))

    def made_property(self, node):
        "The documentation of `name = property(lambda self: ..., doc='...')`; without one, '' and no entry."
        call = node.value
        if not (isinstance(call, ast.Call) and self.text(call.func) == "property"):
            return ""
        return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == "doc"), "")

    def data_field(self, node):
        "(name, type, default, line) of a dataclass's field that is a parameter."
        value = node.value
        default = self.text(value)
        if isinstance(value, ast.Call) and self.text(value.func) == "field":
            given = {k.arg: k.value for k in value.keywords}
            if self.text(given.get("init")) == "False":
                return None
            made = given.get("default_factory")
            default = self.text(given.get("default"))
            if made is not None:
                default = self.text(made.body) if isinstance(made, ast.Lambda) else EMPTY.get(self.text(made), f"{self.text(made)}()")
        kind = self.text(node.annotation)
        if kind.startswith("ClassVar"):
            return None
        return node.target.id, kind, default, node.end_lineno


def every(args):
    "All parameters in the order in which they are written."
    return [*args.posonlyargs, *args.args, *([args.vararg] if args.vararg else []), *args.kwonlyargs, *([args.kwarg] if args.kwarg else [])]


def symbols(source):
    "Name -> `Symbol` of a module or a cell; {} where it is no Python."
    try:
        return Reader(textwrap.dedent(source)).read()
    except (SyntaxError, tokenize.TokenError):
        return {}


def inherit(found):
    "Classes without parameters of their own take those of the nearest base class that is known."
    def rows(s, depth=0):
        if s.rows is not None or depth > 9:
            return s.rows
        known = [found[b.rpartition(".")[2]] for b in s.bases if b.rpartition(".")[2] in found]
        return next((r for b in known if (r := rows(b, depth + 1)) is not None), None)

    for s in found.values():
        s.rows = rows(s)


# -- writing --------------------
def code(text):
    "Code inside a Markdown table."
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if text else ""


def prose(text, link=lambda t: t):
    "A comment or docstring as Markdown: <name> is no tag, a|b no new column, {t: 3} no list of attributes, gh*side no emphasis."
    swap = {"{": "&#123;", "*": "&#42;", "<": "&lt;", "|": "&#124;"}
    text = re.sub(r"`[^`]*`|\$[^$]*\$|[{*<|]", lambda m: swap.get(m[0], m[0].replace("|", "&#124;")), text)
    return link(re.sub(r"`([^`]+)`(s|es|'s)\b", r"<span class='many'>`\1`\2</span>", text))


def brief(s, longest=40):
    "The signature in brief."
    name = s.name.rpartition(".")[2]
    if s.kind == "property" or s.rows is None:
        head = name
    else:
        flat = [(n, " ".join(d.split())) for row in s.rows for n, d in zip(row.names, row.defaults)]
        said = [n + (f"={d if len(d) <= longest else '…'}" if d else "") for n, d in flat]
        for at, mark in sorted(s.marks.items(), reverse=True):
            said.insert(at, mark)
        head = f"{name}({', '.join(said)})"
    return head + (f" -> {s.returns}" if s.returns and s.returns != "None" else "")


def cells(values):
    "What several parameters share, once; else one after the other."
    once = list(dict.fromkeys(values))
    return code(once[0]) if len(once) == 1 else ", ".join(code(v) or "–" for v in values)


def table(s, link):
    "The parameters, where anything is said of them."
    lines = [(", ".join(map(code, r.names)), cells(r.types), cells([" ".join(d.split()) for d in r.defaults]), r.about) for r in s.rows or []]
    lines += [("*attribute* " + code(", ".join(r.names)), "", code(" ".join(r.defaults[0].split())), r.about) for r in s.attributes]
    if s.result:
        lines.append(("*returns*", code(s.returns), "", s.result))
    if not any(line[3] for line in lines):
        return ""
    return "\n".join(["| | type | default | |", "|---|---|---|---|", *(f"| {a} | {b} | {c} | {prose(d, link)} |" for a, b, c, d in lines)])


def markdown(s, title, address, link=lambda t: t):
    """Heading, signature, text, table.

    `title`: the heading with its anchor; `address`: of the definition's line; `link`: turns `names` into links.
    """
    parts = [title, f"[source]({address}){{ .nb-source-link }}" if address else ""]
    text = "\n\n".join(t for t in (s.doc, s.note) if t)
    head = brief(s)
    parts += [prose(text, link), f"```{{ .python .signature }}\n{head}\n```", table(s, link)]
    return "\n\n".join(p for p in parts if p) + "\n"
