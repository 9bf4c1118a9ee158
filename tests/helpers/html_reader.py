"""Reads the HTML that ksmcore makes, as strictly as no browser does."""

import html.parser
import re


class Reader(html.parser.HTMLParser):
    """Checks that what is opened is closed, that nothing is loaded and nothing run."""

    EMPTY = frozenset({"img", "meta", "line"})

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.titles, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "action")
            assert name != "src" or value.startswith("data:image/png;base64,")
            assert name != "style" or "url(" not in value
            if name in ("title", "alt", "aria-label"):
                self.titles.append(value)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts).replace("\xa0", " "))
