"""What a page holds, read as a program reads it."""

import html.parser
import json
import re


class Page(html.parser.HTMLParser):
    """A page's tags, what they would load, its links, its text without scripts and styles, and its blocks of JSON."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.loads, self.links, self.ids, self.data, self.words = [], [], [], [], [], []
        self.inside = ""
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name == "src" or re.search(r"url\((?!#)", value or "")]
        self.links += [value for name, value in attributes if name == "href" and tag == "a"]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag in ("script", "style"):
            self.inside = tag
            if found.get("type") == "application/json":
                self.inside = "json"

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside = ""
        if tag in ("p", "td", "th", "li", "div", "h2", "summary"):
            self.words.append(" ")

    def handle_data(self, data):
        if self.inside == "json":
            self.data.append(json.loads(data))
        if not self.inside:
            self.words.append(data)


def charts(data: dict) -> dict:
    """A menu's charts with the points of their series, of the data that a page holds: [x, y, stderr, label, href]."""
    places, found = data["places"], {}
    for name, spec in data["charts"].items():
        series = []
        for one in spec["series"]:
            points = []
            for (x, label, href), value in zip(places[one["at"]], one["values"]):
                if value is not None:
                    y, error = value if isinstance(value, list) else (value, 0.0)
                    points.append([x, y, error, label, href])
            series.append(one | {"points": points})
        found[name] = spec | {"series": series}
    return found


def part(text: str, heading: str) -> str:
    """The HTML of a page from a heading to the next."""
    return re.split(rf"<h2[^>]*>{heading}</h2>", text)[1].partition("<h2")[0]


def said(text: str) -> str:
    """The verdict's sentences."""
    return Page(text.split("<section class='verdict")[1].split("</section>")[0].partition(">")[2]).text
