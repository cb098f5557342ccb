"""compat.html in a real browser: on a phone and on a screen, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from loudmerge.compat import table
from loudmerge.compat.judging.result import OK
from tests.unit.compat import rows
from tests.unit.compat.browser import Browser, find
from tests.unit.compat.colours import FILLED, style
from tests.unit.compat.png import Colour, Picture

PHONE, SCREEN = 360, 1280
SIZES = (("phone", PHONE, 1500), ("screen", SCREEN, 560))
WIDTHS = "document => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
STUCK = """document => {
    const box = document.querySelector('.box:has(> .grid)');
    box.scrollTo(70, 90);
    const frame = box.getBoundingClientRect();
    const at = selector => box.querySelector(selector).getBoundingClientRect();
    return {
        scrolled: [box.scrollLeft, box.scrollTop],
        head: at('thead th:last-child').top - frame.top,
        name: at('tbody tr:last-child th').left - frame.left,
    };
}"""
MARKED = """document => {
    const mark = document.querySelector('tr.failed .mark.failed').getBoundingClientRect();
    return [mark.left, mark.top, mark.right, mark.bottom].map(Math.round);
}"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return find(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def page(browser: Browser) -> Path:
    """All rows, those that passed last, so that each status is in the picture on a phone too."""
    ordered = sorted(rows.ALL, key=lambda row: row.status == OK)
    table.write(ordered, browser.directory, lag=rows.LAG, generated=rows.GENERATED)
    return browser.directory / table.PAGE


@pytest.fixture(scope="module")
def failed(browser: Browser, page: Path) -> dict[int, list[int]]:
    """Width -> left, top, right and bottom of the first failed mark, in pixels."""
    widths = [width for _, width, _ in SIZES]
    return dict(zip(widths, browser.measure([(page, width) for width in widths], MARKED), strict=True))


class View(NamedTuple):
    picture: Picture
    colours: dict[str, Colour]


VIEWS = {
    f"{name}-{'dark' if dark else 'light'}": (width, height, dark)
    for name, width, height in SIZES
    for dark in (False, True)
}


@pytest.fixture(scope="module", params=VIEWS.values(), ids=list(VIEWS))
def view(request: pytest.FixtureRequest, browser: Browser, page: Path) -> View:
    width, height, dark = request.param
    picture = browser.picture(page, width, height, dark=dark)
    assert (picture.width, picture.height) == (width, height)
    return View(picture, style(dark=dark))


def test_each_status_is_seen(view: View) -> None:
    seen = view.picture.colours()
    assert seen.most_common(1)[0][0] == view.colours["page"]
    assert [name for name in FILLED if seen[view.colours[name]] < 300] == []


def test_a_failed_cell_stands_out_and_can_be_read(view: View, failed: dict[int, list[int]]) -> None:
    left, top, right, bottom = failed[view.picture.width]
    assert 0 <= left < right <= view.picture.width
    assert 0 <= top < bottom <= view.picture.height
    inside = view.picture.colours(left, top, right, bottom)
    area = (right - left) * (bottom - top)
    assert inside[view.colours["failed"]] > area / 2
    assert inside[view.colours["failed-text"]] > area / 100


def test_the_page_never_scrolls_sideways(browser: Browser, page: Path) -> None:
    widths = (320, PHONE, 600, 768, 769, SCREEN, 1920)
    measured = browser.measure([(page, width) for width in widths], WIDTHS)
    assert measured == [[width, width] for width in widths]


def test_a_page_that_scrolls_sideways_is_noticed(browser: Browser, page: Path) -> None:
    wide = page.with_name("wide.html")
    sheet = page.read_text("utf-8").replace("</style>", ".box { overflow: visible !important; }</style>")
    wide.write_text(sheet, "utf-8")
    ((scroll, client),) = browser.measure([(wide, PHONE)], WIDTHS)
    assert client == PHONE
    assert scroll > PHONE


def test_headers_stay_while_the_families_scroll(browser: Browser, page: Path) -> None:
    (stuck,) = browser.measure([(page, PHONE)], STUCK, height=500)
    assert stuck["scrolled"] == [70, 90]
    assert stuck["head"] == pytest.approx(1, abs=1)
    assert stuck["name"] == pytest.approx(1, abs=1)


def test_no_failed_colour_where_nothing_failed(browser: Browser, tmp_path: Path) -> None:
    table.write([rows.SWAPPED], tmp_path, generated=rows.GENERATED)
    picture = browser.picture(tmp_path / table.PAGE, PHONE, 500, dark=False)
    seen, colours = picture.colours(), style(dark=False)
    assert seen[colours["ok"]] > 300
    assert seen[colours["failed"]] == 0
