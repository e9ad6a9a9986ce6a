"""A page as a browser reads it: elements, attributes, text. Only html.parser, so that nothing is mended on the way."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr"}


@dataclass
class Node:
    tag: str
    attributes: dict
    inner: list = field(default_factory=list)

    def all(self, *tags):
        """Elements of these names in this one, in order; of every name if none is given."""
        for child in self.inner:
            if isinstance(child, Node):
                if not tags or child.tag in tags:
                    yield child
                yield from child.all(*tags)

    def one(self, tag):
        found = list(self.all(tag))
        assert len(found) == 1, (tag, len(found))
        return found[0]

    @property
    def text(self):
        return "".join(child.text if isinstance(child, Node) else child for child in self.inner)


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.declaration = ""

    def handle_decl(self, decl):
        self.declaration = decl

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice on {tag}"
        node = Node(tag, dict(attrs))
        self.open[-1].inner.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].inner.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.declaration == "DOCTYPE html"
    assert reader.open == [reader.root], f"<{reader.open[-1].tag}> is left open"
    return reader.root
