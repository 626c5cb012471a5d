"""The page holds what was put in, escaped, and loads nothing from afar."""

from __future__ import annotations

from html.parser import HTMLParser

from matplotlib.figure import Figure

from dartprune.reporting.page import Page


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_everything_is_inside(tmp_path):
    page = Page("A & B <c>")
    page.heading("first")
    page.text("x < y & z")
    page.table(("arm", "loss"), [("dart", 0.5), ("<static>", 1.25)], caption="nats")
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4])
    page.picture(figure, 'a "line"')
    page.settings({"seed": 1, "texts": ["a"]})
    page.write(tmp_path / "page.html")
    reader = Reader()
    reader.feed((tmp_path / "page.html").read_text())
    text = " ".join(reader.words)
    for part in ("A & B <c>", "x < y & z", "<static>", "1.25", "nats", '"seed": 1', 'a "line"'):
        assert part in text
    assert reader.tags.count("td") == 4 and reader.tags.count("h2") == 1
    assert "script" not in reader.tags
    assert reader.sources and all(source.startswith("data:image/svg+xml;base64,") for source in reader.sources)


def test_the_same_page_twice_is_the_same_file(tmp_path):
    for name in ("a", "b"):
        page = Page("t")
        page.table(("x",), [(1,)])
        page.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
