"""Look at a report with headless Chromium: what the page's script draws, and that all of it works.

No part of the test suite, because it needs a browser. With playwright installed and Chromium at
/usr/bin/chromium:

  python tests/monitoring/browse_page.py REPORT.html PICTURES
"""

import json
import re
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SIZES = {"wide": 1400, "narrow": 400}


def data_of(file: Path) -> dict:
    """Return what the page holds as JSON."""
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text("utf-8"), re.S)[1])


def first_loss(page: Page) -> float:
    """Return what the legend says of the training loss of the first run."""
    return float(page.locator("figure").first.locator(".legend b").first.inner_text())


def check(page: Page, data: dict) -> None:
    """Compare what is shown with the data; use every control."""
    run = data["runs"][0]
    train = run["curves"]["train"]
    assert not re.search("undefined|NaN", page.inner_text("body"))
    loss = page.locator("figure").first.locator("svg")
    assert first_loss(page) == float(f"{train['loss'][-1]:.6g}")
    # Hover: the value of the nearest row.
    box = loss.bounding_box()
    page.mouse.move(box["x"] + 56 + (box["width"] - 82) / 2, box["y"] + 60)
    step = int(
        page.locator(".tip:visible b").first.inner_text().removeprefix("step ").replace(",", "")
    )
    middle = train["loss"][train["step"].index(step)]
    assert first_loss(page) == float(f"{middle:.6g}")
    low, high = train["step"][0], train["step"][-1]
    assert abs(step - (low + high) / 2) <= (high - low) / 100
    # Zoom by dragging, on all charts; back by double click.
    before = [path.get_attribute("d") for path in page.locator("path.line").all()]
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 80, steps=4)
    page.mouse.up()
    zoomed = [path.get_attribute("d") for path in page.locator("path.line").all()]
    assert all(a != b for a, b in zip(before, zoomed, strict=True) if a and b)
    assert page.locator("#all").is_visible()
    page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + 60)
    assert [path.get_attribute("d") for path in page.locator("path.line").all()] == before
    # Keys: End reads the last row aloud, plus zooms, Escape shows all.
    loss.focus()
    page.keyboard.press("End")
    said = page.locator("figure").first.locator("[aria-live]").inner_text()
    assert f"{train['loss'][-1]:.6g}" in said
    page.keyboard.press("+")
    assert page.locator("#all").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#all").is_visible()
    # The switches.
    page.locator("figure").first.get_by_role("button", name="log").click()
    assert page.locator("path.line").first.get_attribute("d") != before[0]
    page.locator("figure").first.get_by_role("button", name="log").click()
    for name in ("Tokens", "Wall time", "Step"):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.locator("path.line").first.get_attribute("d").startswith("M")
    page.get_by_label("Smoothing").fill("0")
    assert page.locator("path.faint").count() == 0
    page.get_by_label("Smoothing").fill("5")
    assert page.locator("path.faint").count() > 0
    for name, color in (("Dark", "rgb(15, 18, 22)"), ("Light", "rgb(246, 247, 249)")):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
    page.get_by_role("button", name="Auto", exact=True).click()
    # The table of a chart.
    page.locator("figure").first.locator("summary").click()
    cell = page.locator("figure").first.locator("tbody tr:last-child td").nth(1)
    assert cell.inner_text() == f"{train['loss'][-1]:.6g}"
    _check_reload(page, len(data["runs"]) == 1)
    page.locator("figure").first.locator("summary").click()
    page.get_by_label("Smoothing").fill("2")
    if len(data["runs"]) == 1:
        _check_sections(page, run)


def _check_reload(page: Page, is_single: bool) -> None:
    """An open table, a log axis and the shown events outlive a reload."""
    figure = page.locator("figure").first
    figure.get_by_role("button", name="log").click()
    if is_single:
        page.locator("section:has-text('Events') select").first.select_option("all")
    page.reload()
    assert figure.get_by_role("button", name="log").get_attribute("aria-pressed") == "true"
    assert figure.locator("tbody tr").count() > 0
    if is_single:
        assert page.locator("section:has-text('Events') select").first.input_value() == "all"
    figure.get_by_role("button", name="log").click()


def _check_sections(page: Page, run: dict) -> None:
    kinds = ("skipped_update", "rollback", "start", "signal")
    drawn = sum(event["event"] in kinds or "error" in event for event in run["events"])
    # The run's first start is none; it may be older than the events of the page.
    assert page.locator("figure").first.locator("line.mark").count() == drawn - (
        run["left_out_events"] == 0 and drawn > 0
    )
    for event in run["events"]:
        if fork := event.get("fork"):
            words = [f"fork of {fork['run']} at step {fork['step']:,}"]
            words += [f"{key}: " for key in fork["changed"]]
            assert all(word in page.inner_text("body") for word in words)
    for key, found in run["curves"]["evaluations"].items():
        if key.startswith("eval_loss"):
            title = key.replace("eval_loss/", "Held out: ").replace("eval_loss", "Held out")
            tile = page.locator(".tile").filter(has=page.get_by_text(title, exact=True))
            shown = tile.locator(".value").inner_text()
            assert shown == "not finite" or float(shown) == float(f"{found[key][-1]:.4g}")
    samples = page.locator("section:has(h2:text-is('Samples'))")
    texts = samples.locator("p").all_text_contents() if run["samples"] else []
    newest_first = sorted(run["samples"], key=lambda sample: -sample["step"])
    assert texts == [sample["prompt"] + sample["text"] for sample in newest_first]
    for incident in run["verdict"]["incidents"]:
        assert incident in page.locator(".pill").inner_text()
    is_green = "good" in page.locator(".pill").get_attribute("class")
    assert is_green == (run["verdict"]["said"] == ["finished"])
    if breakdown := run["facts"].get("time_breakdown"):
        widths = page.locator(".waterfall .track i").evaluate_all("l => l.map(i => i.style.width)")
        shares = [float(width.rstrip("%")) for width in widths]
        assert abs(sum(shares[1:]) - 100) < 1
        assert abs(shares[-1] - 100 * breakdown["goodput"]) < 0.01
    page.locator("section:has-text('Events') select").first.select_option("all")
    rows = page.locator("section:has(h2:text-is('Events')) tbody tr").count()
    assert rows == len(run["events"])


def main(file: Path, pictures: Path) -> None:
    """Check the page and write its pictures."""
    data, pictures = data_of(file), pictures.absolute()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for size, width in SIZES.items():
                context = browser.new_context(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                page, said = context.new_page(), []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(error.stack))
                page.on("request", lambda request, said=said: said.append(request.url))
                page.goto(file.absolute().as_uri())
                assert said == [file.absolute().as_uri()], said  # no error, nothing else is loaded
                assert page.evaluate("document.documentElement.scrollWidth") == width
                page.screenshot(path=pictures / f"{scheme}-{size}.png", full_page=True)
                if size == "wide":
                    check(page, data)
                assert set(said) == {file.absolute().as_uri()}, said
                context.close()
        browser.close()
    print(f"all well: {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
