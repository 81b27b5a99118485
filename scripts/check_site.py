"""Check the built site: python scripts/check_site.py [FOLDER]

No link, anchor, image, script or style sheet may be missing, and none may be fetched from elsewhere
(links to follow may lead there). No Markdown may be left in the text: a link within a link, a heading's attributes.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from common import ROOT, settings

LOADS = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "iframe": ["src"],
    "source": ["src", "srcset"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "embed": ["src"],
    "object": ["data"],
    "track": ["src"],
    "use": ["href", "xlink:href"],
    "image": ["href", "xlink:href"],
}
VERBATIM = {"code", "pre", "script", "style", "math", "title"}
RAW = re.compile(r"\]\(|\{ ?[#.:]\w")  # what is left of a link or of attributes that were not understood
NOT_LOADED = {"canonical", "next", "prev", "edit", "alternate", "license", "author"}


class Page(HTMLParser):
    "The ids of a page, what it links to, and what it loads."

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.style, self.classes = set(), [], [], False, set()
        self.verbatim, self.raw = 0, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = {k: v or "" for k, v in attrs}
        self.ids |= {a[k] for k in ("id", "name") if k in a and (k == "id" or tag == "a")}
        self.classes |= set(a.get("class", "").split())
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        if tag == "link" and not NOT_LOADED & set(a.get("rel", "").split()):
            self.loads.append(a.get("href", ""))
        for name in LOADS.get(tag, []):
            if name in a:
                self.loads += [u.split()[0] for u in a[name].split(",") if u.split()] if name == "srcset" else [a[name]]
        self.loads += css_urls(a.get("style", ""))
        self.style = tag == "style"
        self.verbatim += tag in VERBATIM

    def handle_endtag(self, tag):
        self.style = False
        self.verbatim -= tag in VERBATIM

    def handle_data(self, data):
        if self.style:
            self.loads += css_urls(data)
        elif not self.verbatim and (found := RAW.search(data)):
            self.raw.append(data[max(0, found.start() - 40) : found.end() + 40].strip())


def css_urls(text):
    return re.findall(r"url\(\s*['\"]?([^'\")]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)


def main(site):
    if not (site / "index.html").exists():
        sys.exit(f"check_site: no site in {site}; run `make docs`")
    base = urlsplit(settings()["doc_host"] + settings()["doc_baseurl"] + "/")
    pages = {p: Page(p) for p in sorted(site.rglob("*.html"))}
    problems, counted = [], 0

    def look(origin, target, what):
        nonlocal counted
        counted += 1
        url = urlsplit(target)
        if url.scheme in ("data", "mailto", "javascript", "blob") or target in ("", "#"):
            return
        own = (url.scheme, url.netloc) == (base.scheme, base.netloc) and url.path.startswith(base.path)
        if url.netloc and not own:
            if what != "link":
                problems.append((origin, f"loads {target} from elsewhere"))
            return
        path = unquote(url.path)
        if path.startswith("/"):
            if not path.startswith(base.path):
                return problems.append((origin, f"{what} {target} is outside the site"))
            place = site / path.removeprefix(base.path)
        else:
            place = origin if not path else origin.parent / path
        place = place.resolve()
        place = place / "index.html" if place.is_dir() else place
        if not place.exists():
            problems.append((origin, f"{what} {target}: no such file"))
        elif url.fragment and place in pages and what == "link" and not url.fragment.startswith(":~:"):
            if unquote(url.fragment) not in pages[place].ids:
                problems.append((origin, f"link {target}: no such anchor"))

    for path, page in pages.items():
        for target in page.links:
            look(path, target, "link")
        for target in page.loads:
            look(path, target, "file")
        problems += [(path, f"Markdown that was not understood: {text!r}") for text in page.raw]
        if "mermaid" in page.classes:
            problems.append((path, "a mermaid diagram: its script would come from elsewhere"))
    for path in site.rglob("*.css"):
        for target in css_urls(path.read_text(encoding="utf-8")):
            look(path, target, "file")
    if problems:
        shown = dict.fromkeys(f"  {p.relative_to(site)}: {text}" for p, text in problems)
        sys.exit(f"check_site: {len(shown)} faults in the built pages\n" + "\n".join(list(shown)[:60]))
    print(f"{len(pages)} pages, {counted} links and files, nothing missing, nothing from elsewhere")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / settings()["doc_path"]).resolve())
