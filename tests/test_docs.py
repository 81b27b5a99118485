"""What the documentation site says of a symbol: read from its source, put as Markdown."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def names(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import docs_symbols

    yield docs_symbols
    sys.modules.pop("docs_symbols", None)


@pytest.fixture
def docs(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield pytest.importorskip("docs")
    for name in ("docs", "common", "docs_symbols"):
        sys.modules.pop(name, None)


def one(names, source):
    return next(iter(names.symbols(source).values()))


def rows(names, source):
    return names.table(one(names, source), lambda t: t).splitlines()[2:]


def test_parameters_on_one_line_share_a_row(names):
    source = "def read(\n    row:int, col:int=0, # upper left corner\n    *, size:tuple=(1, 2), # px\n)->dict: # both\n    pass"
    assert names.brief(one(names, source)) == "read(row, col=0, *, size=(1, 2)) -> dict"
    assert rows(names, source) == [
        "| <code>row</code>, <code>col</code> | <code>int</code> | –, <code>0</code> | upper left corner |",
        "| <code>size</code> | <code>tuple</code> | <code>(1, 2)</code> | px |",
        "| *returns* | <code>dict</code> |  | both |",
    ]


def test_a_comment_belongs_to_its_own_line(names):
    found = rows(names, "def run(\n    out, t:int, # folder\n    size:int,\n    a=1, b=2, # numbers\n): pass")
    assert [r.split(" | ")[0] for r in found] == ["| <code>out</code>, <code>t</code>", "| <code>size</code>", "| <code>a</code>, <code>b</code>"]
    assert found[1].endswith("|  |") and found[2].endswith("numbers |")


def test_the_comment_of_a_definition_on_one_line_is_no_parameters(names):
    "It says what goes in and out; with a documented result it is the result's."
    s = one(names, "def window(self, row, col): # inside the file -> (h, w)\n    'A piece'")
    assert names.table(s, str) == "" and "A piece\n\ninside the file -> (h, w)" in names.markdown(s, "## window", "")
    assert rows(names, "def world()->int: return 1 # processes") == ["| *returns* | <code>int</code> |  | processes |"]
    assert "*returns*" not in names.markdown(one(names, "def f(x) -> float: # px -> m\n    pass"), "## f", "")


def test_only_annotations_are_types(names):
    assert rows(names, "def f(\n    augment=True, # or an `Augment`\n): pass") == ["| <code>augment</code> |  | <code>True</code> | or an `Augment` |"]


def test_what_the_linter_is_told_is_no_description(names):
    assert names.table(one(names, "def loss(self, out):  # noqa: F811\n    pass"), str) == ""
    assert "noqa" not in names.markdown(one(names, "def loss(out):  # noqa: F811, E501\n    pass"), "## loss", "")
    assert rows(names, "def f(out) -> list:  # noqa: F811 - boxes\n    pass")[-1] == "| *returns* | <code>list</code> |  | boxes |"


def test_fields_show_what_their_factory_makes(names):
    source = (
        "@dataclass\nclass T:\n    x:float; y:float # m\n    kept:dict = field(default_factory=dict) # none\n"
        "    net:dict = field(default_factory=lambda: dict(depth=4))\n"
    )
    s = one(names, source)
    assert names.brief(s) == "T(x, y, kept={}, net=dict(depth=4))"
    assert rows(names, source)[0].startswith("| <code>x</code>, <code>y</code> | <code>float</code> |")


def test_what_would_be_swallowed(names):
    row = rows(names, "def f(\n    pick=None, # a|b, <name>.tif, e.g. {t: 3} or `{t: 3}`, gh*side\n): pass")[0]
    assert row == "| <code>pick</code> |  | <code>None</code> | a&#124;b, &lt;name>.tif, e.g. &#123;t: 3} or `{t: 3}`, gh&#42;side |"


def test_patched_methods_belong_to_their_class(names):
    source = "@patch\ndef a(self:Net, x): pass\n@patch(cls_method=True)\ndef make(cls:Net, n=2): 'One'\n@patch(as_prop=True)\ndef size(self:Net)->int: 'Tiles'"
    found = names.symbols(source)
    assert list(found) == ["Net.a", "Net.make", "Net.size"]
    assert [names.brief(s) for s in found.values()] == ["a(x)", "make(n=2)", "size -> int"]


def test_members_properties_and_attributes(names):
    source = (
        "class A(B):\n    order = 3 # after the others\n    def __init__(self, x): pass\n    def _own(self): pass\n"
        "    n = property(lambda self: 1, doc='How many')\n    def train(self): pass"
    )
    found = names.symbols(source)
    assert list(found) == ["A", "A.n", "A.train"] and all(s.member for n, s in found.items() if "." in n)
    assert found["A.n"].doc == "How many" and names.brief(found["A.n"]) == "n"
    assert "*attribute* <code>order</code> |  | <code>3</code> | after the others" in names.markdown(found["A"], "## A", "")


def test_a_class_without_parameters_has_those_of_its_base(names):
    found = names.symbols("class A:\n    def __init__(self,\n        x, # a\n        **kw # of B\n    ): pass\nclass C(A): pass\nclass D(Elsewhere): pass")
    names.inherit(found)
    assert names.brief(found["C"]) == "C(x, **kw)" and names.brief(found["D"]) == "D"
    assert names.table(found["C"], str).endswith("| <code>**kw</code> |  |  | of B |")


def test_every_symbol_of_the_package_is_found_on_its_line(docs):
    cfg = docs.settings()
    modules = docs.module_symbols(cfg)
    assert sum(len(m) for m in modules.values()) > 500
    for file, found in modules.items():
        lines = (docs.ROOT / file).read_text(encoding="utf-8").splitlines()
        for s in found.values():
            assert s.name.rpartition(".")[2] in lines[s.line - 1], f"{file}: {s.name} is not on line {s.line}"


@pytest.mark.parametrize("page, to", [("evaluate.md", "evaluate.md"), ("api/evaluate.md", "../evaluate.md"), ("demo.md", "cli.md")])
def test_a_page_means_its_own_symbol(docs, monkeypatch, page, to):
    monkeypatch.setattr(docs, "SHOWN", {"cli.md": {"compare"}, "evaluate.md": {"compare"}})
    cfg = {"doc_host": "https://a.org", "doc_baseurl": "/b"}
    text = docs.relink("rows of [`compare`](https://a.org/b/cli.html#compare)", page, "nbs", cfg, {})
    assert text.strip() == f"rows of [`compare`]({to}#compare)"


def test_plain_words_are_linked_on_their_own_page_alone(docs, monkeypatch):
    monkeypatch.setattr(docs, "SHOWN", {"cli.md": {"probe"}, "core.md": {"rgb"}})
    cfg = {"doc_host": "https://a.org", "doc_baseurl": "/b"}
    text = "the mode [`probe`](https://a.org/b/cli.html#probe) on [`rgb`](https://a.org/b/core.html#rgb)"
    assert docs.relink(text, "protocol.md", "nbs", cfg, {}).strip() == "the mode `probe` on `rgb`"
    assert docs.relink(text, "cli.md", "nbs", cfg, {}).strip() == "the mode [`probe`](cli.md#probe) on `rgb`"


def test_a_value_shows_all_its_keys(docs):
    from types import SimpleNamespace

    made = SimpleNamespace(UNITS={f"unit_{i}": i for i in range(40)}, LIMIT=3)
    rows = list(docs.constants(["UNITS", "LIMIT"], made, "LIMIT = 3 # per tile\n"))
    assert "<code>unit_39</code>" in rows[0] and rows[1] == "| `LIMIT` | <code>3</code> | per tile |"


def test_names_of_functions_in_formulas_stand_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    hooks = pytest.importorskip("docs_hooks")
    thin = '<mspace width="0.17em"></mspace>'
    assert f"<mi>log</mi>{thin}<mn>8</mn>" in hooks.to_mathml(r"\log 8", False)
    assert f"<mn>2</mn>{thin}<mi>cos</mi><mo" in hooks.to_mathml(r"2\cos(a)", False)
    assert "<mo>&#x000B1;</mo>" in hooks.to_mathml(r"a\pm b", False)
    assert ")</mo><msub><mi></mi><mi>k</mi>" in hooks.to_mathml(r"\Big(x\Big)_k", False)
    sys.modules.pop("docs_hooks", None)


def test_every_table_of_parameters_is_complete(docs):
    "Where something is said of one parameter, it is said of all; the generated scenes' painters are still to be done."
    gaps = []
    for file, found in docs.module_symbols(docs.settings()).items():
        for s in found.values():
            rows = [] if any(part[0] == "_" for part in s.name.split(".")) or file.endswith("synthetic.py") else s.rows or []
            gaps += [f"{file}: {s.name}: {r.names}" for r in rows if any(o.about for o in rows) and not r.about]
    assert not gaps, "\n".join(gaps)
