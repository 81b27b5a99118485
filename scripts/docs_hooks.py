"MkDocs hook: math becomes MathML while the site is built, so that no page needs a script for it."

import html
import logging
import re

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.math")
MATH = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.S)


NAME = r"<m[io]>(?:log|exp|cos|sin|softmax|logsoftmax|min|max|argmin|argmax|Var|sg)</m[io]>"


def spaced(mathml):
    "Thin spaces around the names of functions, which MathML does not give; \\pm is an operator; a large bracket with an index stays large."
    thin = '<mspace width="0.17em"></mspace>'
    mathml = mathml.replace("<mi>&#x000B1;</mi>", "<mo>&#x000B1;</mo>")
    mathml = re.sub(rf"({NAME})(?!</|<mo[^>]*>(?:\(|&#x0028;|&#x00028;))", rf"\1{thin}", mathml)
    mathml = re.sub(rf"(</m(?:i|n|sub|sup|subsup|over|row|frac)>)({NAME})", rf"\1{thin}\2", mathml)
    return re.sub(r"<msub>(<mo minsize[^>]*>\)</mo>)", r"\1<msub><mi></mi>", mathml)


def to_mathml(tex, block):
    "One formula. A command that the converter does not know stays in its result as text with a backslash."
    tex = re.sub(r"\\tag\{.*?\}|\\label\{.*?\}", "", tex)
    tex = re.sub(r"(begin|end)\{(aligned|gathered)\}", r"\1{align*}", tex)
    result = convert(tex.strip(), display="block" if block else "inline")
    # a fence without \left and \right keeps its size; MathML would stretch it to the height of the whole line
    result = re.sub(
        r"<mo>(&#x0(?:2016|27E8|27E9|2308|2309|230A|230B|2225|2223|007C|0028|0029|005B|005D|007B|007D);)</mo>",
        r'<mo stretchy="false">\1</mo>',
        result,
    )
    result = spaced(result)
    if unknown := re.search(r"\\[A-Za-z]+", re.sub(r"<annotation.*?</annotation>", "", result, flags=re.S)):
        raise ValueError(f"{unknown.group()} is not known to latex2mathml")
    if "<mi>&amp;</mi>" in result or "&#x00026;" in result:
        raise ValueError("an & outside of an environment that latex2mathml knows (align*, aligned, cases, matrices)")
    return result


def on_page_content(content, page, config, files):
    def replace(match):
        tag, bracket, tex = match.groups()
        try:
            return f'<{tag} class="math">{to_mathml(html.unescape(tex), bracket == "[")}</{tag}>'
        except Exception as e:  # noqa: B902 - whatever the converter stumbles over is the page's fault
            log.warning("%s: cannot render the formula %s (%s)", page.file.src_uri, tex.strip(), e)
            return match.group()

    def plain(items):
        for item in items:
            item.title = re.sub(r"\\[()]", "", item.title)
            plain(item.children)

    plain(page.toc.items)
    return MATH.sub(replace, content)
