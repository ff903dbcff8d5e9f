"""Take outputs/play.png, a picture of outputs/play.html, and put it into the notebook's output.

    python tests/picture.py    # needs Chromium, chromedriver and selenium"""
import base64
import time

import nbformat
from PIL import Image

from results import ROOT
from test_play import Page, started


def main():
    driver = started()
    page = Page(driver, ROOT / "outputs/play.html", height=1150)
    page.the("#run").click()
    while len(page.text) < 420:
        time.sleep(0.2)
    page.the("#run").click()
    page.js("document.documentElement.style.scrollbarWidth = 'none'")
    page.js("marks[arguments[0]].click(); scrollTo(0, 0)", page.text[:400].rindex(" ") + 1)
    time.sleep(1)
    file = ROOT / "outputs/play.png"
    driver.save_screenshot(file)
    driver.quit()
    Image.open(file).quantize(96).save(file, optimize=True)
    path = ROOT / "gpt_from_scratch.ipynb"
    book = nbformat.read(path, as_version=4)
    cell = next(cell for cell in book.cells if 'Image(outputs / "play.png")' in cell.source)
    picture = next(output.data for output in cell.outputs if "image/png" in output.data)
    picture["image/png"] = base64.b64encode(file.read_bytes()).decode()
    nbformat.write(book, path)


if __name__ == "__main__":
    main()
