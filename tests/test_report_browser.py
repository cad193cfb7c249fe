"""The report in a real browser: every figure there, readable on a phone, in light and dark, and nothing else loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_cases as cases

from pyprune import report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; `make browser` installs it")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
# A machine that is busy with something else starts a browser slowly.
PATIENCE = 300_000
SIZES = {"desktop": (1280, 800), "phone": (360, 740)}
MEASURE = """() => {
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const root = document.scrollingElement;
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const figures = [...document.querySelectorAll('figure')].map(figure => {
    const drawing = figure.querySelector('svg'), scale = drawing.getScreenCTM(), edge = drawing.getBoundingClientRect();
    const texts = [...drawing.querySelectorAll('text')];
    const size = text => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(scale.a, scale.b);
    const beyond = text => {
      const r = text.getBoundingClientRect();
      return r.left < edge.left - 3 || r.right > edge.right + 3 || r.top < edge.top - 3 || r.bottom > edge.bottom + 3;
    };
    return {
      name: figure.id, width: edge.width, height: edge.height,
      paths: [...drawing.querySelectorAll('path')].filter(p => p.getTotalLength() > 0).length,
      texts: texts.length, smallest: Math.min(...texts.map(size)), beyond: texts.filter(beyond).map(t => t.textContent),
    };
  });
  const cut = [...document.querySelectorAll('h1, h2, h3, p, dd, dt, figcaption, pre, summary')]
    .filter(e => e.getClientRects().length && (box(e)[2] > innerWidth + 1 || box(e)[0] < -1));
  const style = getComputedStyle(document.body);
  const ink = getComputedStyle(document.querySelector('figure svg text')).fill;
  return {
    figures, cut: cut.map(e => e.textContent.slice(0, 40)), wide: root.scrollWidth, inner: innerWidth,
    answer: box(document.querySelector('#answer')), height: innerHeight, page: style.backgroundColor, ink,
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=list(ARGUMENTS), timeout=PATIENCE
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(cases.fill_all(tmp_path_factory.mktemp("facts"))).path


def _brightness(colour: str) -> float:
    """Mean of red, green and blue of `rgb(r, g, b)`, 0 to 255."""
    numbers = colour[colour.index("(") + 1 : colour.index(")")].split(",")[:3]
    return sum(float(n) for n in numbers) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_as_a_reader_sees_it(size: str, scheme: str, browser: Any, page_file: Path) -> None:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    try:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        loaded: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: loaded.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(page_file.as_uri())
        found = page.evaluate(MEASURE)
    finally:
        context.close()
    assert loaded == [page_file.as_uri()]
    assert said == []
    assert found["wide"] <= found["inner"] == width
    assert found["cut"] == []
    left, top, right, bottom = found["answer"]
    assert 0 <= left < right <= width and 0 <= top < bottom <= found["height"] == height
    assert len(found["figures"]) == 31
    for figure in found["figures"]:
        assert figure["width"] > 200 and figure["height"] > 100, figure
        assert figure["paths"] >= 3 and figure["texts"] >= 3, figure
        assert figure["smallest"] >= 8, figure
        assert figure["beyond"] == [], figure
    paper, ink = _brightness(found["page"]), _brightness(found["ink"])
    assert paper > 200 > 130 > ink if scheme == "light" else paper < 60 < 130 < ink


def test_the_measure_would_notice(browser: Any, tmp_path: Path) -> None:
    """A page with an empty figure and a line that is too long: what the test above would have refused."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<p id="answer">a</p><p style="width: 900px">b</p><figure id="f"><svg viewBox="0 0 300 200" width="300">'
        '<text x="290" y="9" style="font-size: 4px">far outside of it</text></svg></figure>'
    )
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(bad.as_uri())
    found = page.evaluate(MEASURE)
    page.close()
    figure = found["figures"][0]
    assert found["wide"] > 360 and found["cut"] == ["b"]
    assert figure["paths"] == 0 and figure["smallest"] == 4 and figure["beyond"] == ["far outside of it"]
