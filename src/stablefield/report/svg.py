"""SVG that may lie inside a page: checked, so that it can neither run nor fetch anything, and with ids of its own.

A page holds several pictures, and all ids of a page are one space: a picture drawn twice would take its clip paths from
the first, which is nowhere where that one is hidden. `with_prefix` keeps them apart.
"""

import re
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element

__all__ = ["check_svg", "parse_svg", "printable", "with_prefix", "write_svg"]

FORBIDDEN = {"script", "foreignobject", "iframe", "object", "embed", "a", "style", "animate", "set"}
"""Elements that run, fetch, or reach the rest of the page."""
REFERENCE = re.compile(r"url\(\s*(['\"]?)(.*?)\1\s*\)")


UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML and UTF-8 have no place for: controls, and halves of characters as in file names that are no UTF-8."""


def printable(text: str) -> str:
    """The text with the sign for an unknown character in place of each that cannot be written."""
    return UNPRINTABLE.sub("\ufffd", text)


def parse_svg(name: str, text: str) -> Element:
    """The root of an SVG picture, names without their namespaces.

    Raises:
        ValueError: if the text is not one, beginning with the argument's `name`.
    """
    if "<!" in text:
        raise ValueError(f"{name} holds a declaration ('<!'): pass the <svg> element alone.")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"{name} is not well-formed XML ({error}): pass one whole <svg> element.") from error
    for element in root.iter():
        element.tag = _local(element.tag)
        for key in [key for key in element.attrib if "}" in key]:
            element.set(_local(key), element.attrib.pop(key))
    if root.tag != "svg" or "viewBox" not in root.attrib:
        raise ValueError(f"{name} is a <{root.tag}> element: pass an <svg> element with a viewBox.")
    return root


def check_svg(name: str, text: str) -> None:
    """Refuse SVG that runs or fetches anything.

    Raises:
        ValueError: if it is not SVG, or has an element or attribute that does.
    """
    for element in parse_svg(name, text).iter():
        if element.tag.lower() in FORBIDDEN:
            raise ValueError(f"{name} has a <{element.tag}> element: a picture in a report neither runs nor links.")
        for key, value in element.attrib.items():
            links = [found for _, found in REFERENCE.findall(value)] + ([value] if key in {"href", "src"} else [])
            outward = [link for link in links if not link.startswith(("#", "data:image/png;"))]
            if key.lower().startswith("on") or outward:
                raise ValueError(
                    f"{name} has {key}={value[:60]!r} on a <{element.tag}> element: a picture in a report neither runs nor "
                    "fetches anything."
                )


def with_prefix(text: str, prefix: str, label: str) -> str:
    """The picture with `prefix` before each of its ids, presented as one image named `label`.

    Args:
        text: SVG that `check_svg` accepts.
        prefix: letters, digits and hyphens, unlike that of any other picture of the page.
        label: what the picture shows, in words.
    """
    root = parse_svg("svg", text)
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, prefix + value)
            elif key == "href" and value[1:] in ids:
                element.set(key, f"#{prefix}{value[1:]}")
            elif "url(" in value:
                element.set(key, REFERENCE.sub(lambda found: f"url(#{prefix}{found[2].lstrip('#')})", value))
    root.attrib.update({"role": "img", "aria-label": label})
    return write_svg(root)


def write_svg(root: Element) -> str:
    """The picture as text that HTML and XML read alike."""
    return ET.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]
