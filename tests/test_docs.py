"""The documentation site's tables of parameters."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def docs(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield pytest.importorskip("docs")
    for name in ("docs", "common"):
        sys.modules.pop(name, None)


def table(docs, signature):
    return docs.parameters(docs.SIGNATURE.search(f"```python\n\n{signature}\n\n```")).splitlines()


def test_parameters_on_one_line_share_a_row(docs):
    source = "def read(\n    row:int, col:int=0, # upper left corner\n    *, size:tuple=(1, 2), # px\n)->dict: # both"
    head, *rows = [line for line in table(docs, source) if line.startswith(("|", "read"))]
    assert head == "read(row, col=0, *, size=(1, 2)) -> dict"
    assert rows[2:] == [
        "| <code>row</code>, <code>col</code> | <code>int</code> | <code>0</code> | upper left corner |",
        "| <code>size</code> | <code>tuple</code> | <code>(1, 2)</code> | px |",
        "| *returns* | <code>dict</code> |  | both |",
    ]


def test_a_comment_belongs_to_its_own_line_of_the_source(docs):
    "nbdev prints a parameter without a comment in front of the next one that has one."
    source = "def run(\n    out, t:int, # folder\n    size:int,\n    a=1, b=2, # numbers\n): pass"
    assert docs.own_lines(source, "run") == dict(out=2, t=2, size=3, a=4, b=4)
    signature = "def run(\n    out, t:int, # folder\n    size:int, a=1, b=2, # numbers\n):"
    found = docs.SIGNATURE.search(f"```python\n\n{signature}\n\n```")
    rows = docs.parameters(found, at=docs.own_lines(source, "run")).splitlines()[-3:]
    assert [r.split(" | ")[0] for r in rows] == ["| <code>out</code>, <code>t</code>", "| <code>size</code>", "| <code>a</code>, <code>b</code>"]
    assert rows[1].endswith("|  |") and rows[2].endswith("numbers |")
    assert docs.own_lines("class A:\n    x:float; y:float\n    angle:float # rad", "A") == dict(x=2, y=2, angle=3)


def test_what_says_nothing_or_would_be_swallowed(docs):
    row = table(docs, "def f(\n    pick:NoneType=None, # a|b, e.g. {t: 3} or `{t: 3}`\n):")[-1]
    assert row == "| <code>pick</code> |  | <code>None</code> | a&#124;b, e.g. &#123;t: 3} or `{t: 3}` |"


def test_products_are_no_emphasis(docs):
    assert docs.cell_text("(B, gh*side, gw*side), `a*b*c`") == "(B, gh&#42;side, gw&#42;side), `a*b*c`"


def test_commas_inside_stay(docs):
    assert docs.split("a:dict[str, int]={'x, y': 1}, b=\", \", *c") == ["a:dict[str, int]={'x, y': 1}", 'b=", "', "*c"]


def test_no_parameter(docs):
    assert table(docs, "def world()->int: # processes")[1:2] == ["world() -> int"]
    assert table(docs, "def world()->int: # processes")[-1] == "| *returns* | <code>int</code> |  | processes |"


@pytest.mark.parametrize("page, to", [("evaluate.md", "evaluate.md"), ("api/evaluate.md", "../evaluate.md"), ("demo.md", "cli.md")])
def test_a_page_means_its_own_symbol(docs, monkeypatch, page, to):
    monkeypatch.setattr(docs, "SHOWN", {"cli.md": {"probe"}, "evaluate.md": {"probe"}})
    cfg = {"doc_host": "https://a.org", "doc_baseurl": "/b"}
    text = docs.relink("rows of [`probe`](https://a.org/b/cli.html#probe)", page, "nbs", cfg, {})
    assert text.strip() == f"rows of [`probe`]({to}#probe)"


def test_what_the_source_says(docs):
    own = "@patch(as_prop=True)\ndef size(self:Store) -> int:\n    'Tiles'\n    return 1"
    base = "class A(B):\n    def __init__(self,\n        x, # a\n        **kw # of B\n    ): pass\n    def train(self): pass"
    assert docs.told(own, "size") == (True, True, None)
    assert docs.told(base, "train") == (False, False, None)
    assert docs.told(base, "A") == (True, False, "of B")
    shown = docs.symbol("---\n\n### train\n\n```python\n\ndef train():\n\n```\n\n*Set the module in training mode.*", base)
    assert "train()" in shown and "training mode" not in shown
    found = docs.SIGNATURE.search("```python\n\ndef A(\n    x, # a\n    **kw\n)->None: # of B\n\n```")
    assert docs.parameters(found, "of B").splitlines()[-1] == "| <code>**kw</code> |  |  | of B |"
