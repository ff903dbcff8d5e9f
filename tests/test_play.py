"""The page of appendix D in a real browser: it must compute what gpt.py computes, and answer to
mouse, touch and keyboard. The browser's part is skipped where Chromium, its driver or selenium is
missing (Debian: apt-get install chromium chromium-driver; pip install selenium)."""
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import gpt
from conftest import PLAY, ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER, DRIVER = next(filter(None, map(shutil.which, NAMES)), None), shutil.which("chromedriver")
try:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait
except ImportError:
    webdriver = None
WISH = "\n\nA </script><b>\" & {0} é"  # of a text that would break a careless page


def cells():
    """Code cells of appendix D."""
    found, inside = [], False
    for cell in json.loads((ROOT / "gpt_from_scratch.ipynb").read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith("# "):
            inside = source.startswith("# Appendix D")
        elif inside and cell["cell_type"] == "code":
            found.append(source)
    return found


def built(folder, chars, text, roles, **sizes):
    """What the cells define and write, for a model with random weights: none of them is zero."""
    torch.manual_seed(3)
    plan = dict(n_layer=3, n_head=2, n_embd=32, block_size=24, vocab_size=len(chars)) | sizes
    model = gpt.GPT(replace(gpt.Config(), **plan)).eval()
    for block in model.blocks:
        for matrix in (block.out, block.down):
            torch.nn.init.normal_(matrix.weight, std=0.2)
    torch.nn.init.normal_(model.head.weight, std=0.4)
    moments = [dict(step=step, seconds=2.0 * step, val_loss=4 - step / 100, text=f"{step}{WISH}")
               for step in (0, 10, 100)]
    scope = {"gpt": gpt, "torch": torch, "json": json, "sys": sys, "Path": Path, "asdict": asdict,
             "display": lambda *shown: scope["shown"].extend(shown), "Markdown": str, "shown": [],
             "best": model, "chars": chars, "moments": moments, "outputs": folder, "text": text,
             "val_data": gpt.encode(text[:2000], chars),
             "H": model.config.n_head, "roles": roles | {"unfilled": (0, 0)},
             "score": {name: torch.ones(6) for name in roles} | {"unfilled": torch.full((6,), 0.1)},
             "base": dict.fromkeys([*roles, "unfilled"], torch.full((6,), 0.1))}
    for source in cells():
        exec(source, scope)
    return scope


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    text = PLAY.read_text("utf-8")
    roles = {"one back": (0, 1), "line's start": (2, 0), "<b>": (2, 0)}
    return built(tmp_path_factory.mktemp("play"), "".join(sorted(set(text))), text, roles)


def started():
    """A Chromium without a window and without a network."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--force-prefers-reduced-motion", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def browser():
    if not (BROWSER and DRIVER and webdriver):
        pytest.skip("no browser to drive: needs Chromium, chromedriver and selenium")
    driver = started()
    yield driver
    driver.quit()


class Page:
    """The opened page, by what a person does and sees."""
    def __init__(self, driver, file, width=1200, height=1000):
        self.driver = driver
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=width < 500)
        driver.get(Path(file).as_uri())

    def command(self, name, **values):
        self.driver.execute_cdp_cmd(name, values)

    def js(self, script, *values):
        return self.driver.execute_script(script, *values)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def the(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def begin(self, text):
        """Put a text into the field at once, as pasting does."""
        self.js("const field = $('#prompt'); field.value = arguments[0];"
                "field.dispatchEvent(new Event('input'))", text)

    def dial(self, name, value):
        self.js("const dial = $('#' + arguments[0]); dial.value = arguments[1];"
                "dial.dispatchEvent(new Event('input', { bubbles: true }))", name, value)

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    @property
    def text(self):
        return self.js("return ids.map(id => chars[id]).join('')")

    @property
    def cursor(self):
        """Place of the framed character, as the page shows it."""
        chosen = self.js("return marks.map(mark => mark.ariaSelected)")
        assert chosen.count("true") == 1
        return chosen.index("true")

    def differs(self, expected):
        """The largest difference between the logits at the cursor and others."""
        return (torch.tensor(self.js("return [...seen.logits]")) - expected).abs().max()

    def bars(self):
        """Characters and shares of the bars."""
        return [[part.text for part in bar.find_elements(By.CSS_SELECTOR, ".glyph, .share")]
                for bar in self.all("#bars button")]


@pytest.fixture
def page(browser, made):
    browser.get_log("browser")  # what another page has said
    yield Page(browser, made["outputs"] / "play.html")
    assert browser.get_log("browser") == []


def read(model, ids, start=0):
    """gpt.py's logits after each of the ids, read one by one through the cache, from `start` on."""
    cache = gpt.KVCache(model.config, 1)
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([[i]]), cache)[0, -1] for i in ids[start:]])


def test_page_is_small_and_alone(made):
    page = (made["outputs"] / "play.html").read_text("utf-8")
    parts = re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL)
    lines = [line for _, part in parts for line in part.strip().splitlines()]
    assert [name for name, _ in parts] == ["style", "script"]
    assert len(lines) <= 350 and max(map(len, lines)) <= 100
    assert not re.search(r"https?:|//\w+\.|@import|url\(|src=|href=(?!\"data:,\")", page)
    assert page.count("</script>") == 2 and "<b>\"" not in page  # nothing of the text is markup
    assert "default-src 'none'" in page


def test_notebook_shows_the_page_but_does_not_hold_it():
    notebook = json.loads((ROOT / "gpt_from_scratch.ipynb").read_text("utf-8"))
    outputs = [part for cell in notebook["cells"] if "play.html" in "".join(cell["source"])
               for part in cell.get("outputs", [])]
    assert len(json.dumps(outputs)) < 300_000
    assert not any("A GPT to play with</h1>" in json.dumps(part) for part in outputs)


def test_colours_are_legible(made):
    """Contrast of at least 4.5 (WCAG AA) in both schemes, on the deepest blue, too."""
    def light(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)] if colour[0] == "#" else [
            int(part) / 255 for part in colour.split()]
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    schemes = re.findall(r":root \{([^}]*--paper[^}]*)\}", made["PLAY_STYLE"])
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): ([^;]+);", scheme))
        for ink, ground in [("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card"),
                            ("ink", "heat"), ("paper", "blue"), ("focus", "card")]:
            dark, bright = sorted((light(colours[ink]), light(colours[ground])))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_logits_are_those_of_gpt_py(page, made):
    text = made["text"][:200]
    for start in (0, 150):  # past the window: 24 characters
        seen = page.js("const ids = [...arguments[0]].map(char => chars.indexOf(char));"
                       "const start = arguments[1], from = ids.slice(start), all = from.map("
                       "(_, i) => [...forward(ids, start + i, start).logits]); return all",
                       text, start)
        expected = read(made["small"], gpt.encode(text, made["chars"]).tolist(), start)
        assert (torch.tensor(seen) - expected).abs().max() < 1e-3


def test_greedy_text_is_that_of_gpt_py(page, made):
    ids = gpt.encode("The tide", made["chars"])[None]
    expected = [int(i) for i in gpt.generate(made["small"], ids, 300, temperature=0)]
    page.begin("The tide")
    page.dial("temperature", 0)
    page.js("for (let i = 0; i < 300; i++) take(sample_next(seen.logits, ...dials()))")
    assert page.text == "The tide" + "".join(made["chars"][i] for i in expected)
    assert page.the("#board").text.replace("↵", "").split() == page.text.split()


def test_beginning_longer_than_the_window(page, made):
    """Its last window is read, as by `generate`; the rest is grey, and can be gone back to."""
    text = made["text"][300:400]
    page.begin(text)
    ids = gpt.encode(text, made["chars"]).tolist()
    assert page.differs(read(made["small"], ids, 76)[-1]) < 1e-3
    assert len(page.all("#board .unread")) == 76
    page.js("move(49)")
    assert page.differs(read(made["small"], ids[:50], 26)[-1]) < 1e-3
    assert len(page.all("#board .later")) == 50 and page.text == text


def test_type_write_and_stop(page):
    page.the("#prompt").clear()
    page.the("#prompt").send_keys("The sea")
    assert page.text == "The sea" and page.cursor == 6
    page.the("#run").click()
    assert page.the("#run").text == "Stop"
    WebDriverWait(page.driver, 30).until(lambda _: len(page.text) > 10)
    page.the("#run").click()
    written = page.text
    assert page.the("#run").text == "Write" and written.startswith("The sea")
    page.js("return new Promise(done => setTimeout(done, 200))")
    assert page.text == written and page.cursor == len(written) - 1
    page.js("$('#pace').value = 1000")
    page.the("#run").click()  # stops by itself after 500
    WebDriverWait(page.driver, 60).until(lambda _: page.the("#run").text == "Write")
    assert len(page.text) == len(written) + 500


def test_step_back_and_click(page):
    page.begin("The sea is wide")
    page.the("#step").click()
    assert len(page.text) == 16 and page.cursor == 15
    page.the("#back").click()
    marks = page.all("#board [role=option]")
    assert page.cursor == 14 and marks[15].get_attribute("class") == "later"
    marks[6].click()
    assert page.cursor == 6 and len(page.text) == 16  # nothing is lost until the model goes on
    page.the("#step").click()
    assert page.text[:7] == "The sea" and len(page.text) == 8 and page.cursor == 7


def test_editing_keeps_what_was_read_only_where_it_holds(page, made):
    for text in ("The sea", "The sea is", "The bell", "The", "a", "The sea" * 9, "sea" * 20, "T"):
        page.begin(text)
        start = page.js("return start")
        expected = read(made["small"], gpt.encode(text, made["chars"]).tolist(), start)[-1]
        assert page.differs(expected) < 1e-3, text
    assert start == 0


def test_unknown_characters_are_shown_and_left_out(page, made):
    assert "é" not in made["chars"] and "\N{SNOWMAN}" not in made["chars"]
    page.begin("Thé \N{SNOWMAN}sea")
    assert page.text == "Th sea"
    unknown = page.all("#board .unknown")
    assert [mark.text for mark in unknown] == ["é", "\N{SNOWMAN}"]
    assert unknown[0].accessible_name == "“é”, unknown to the model"
    assert "never seen “é”, “\N{SNOWMAN}”" in page.the("#unknown").text
    unknown[0].click()
    assert page.cursor == 5
    page.begin("\N{SNOWMAN}")  # nothing that the model knows
    page.the("#run").click()
    page.the("#step").click()
    page.the("#back").click()
    assert page.text == "" and page.js("return $('#choose').inert && $('#look').inert")
    page.begin("The")
    assert page.the("#unknown").text == "" and not page.js("return $('#choose').inert")


def test_dials_and_bars(page, made):
    page.begin("The sea")
    logits = read(made["small"], gpt.encode("The sea", made["chars"]).tolist())[-1]
    for dials in [(1, 0, 1), (0.5, 0, 1), (1.5, 5, 1), (1, 0, 0.6), (0.8, 9, 0.5), (0, 0, 1)]:
        temperature, top_k, top_p = dials
        for name, value in zip(("temperature", "top_k", "top_p"), dials):
            page.dial(name, value)
        best, ids = logits.topk(min(top_k or len(logits), len(logits)))  # as sample_next does
        probs = ((best - best[0]) / max(temperature, 1e-9)).softmax(-1)
        probs[probs.cumsum(-1) - probs >= max(top_p, 1e-9)] = 0
        probs /= probs.sum()
        for (glyph, share), p, i in zip(page.bars(), probs.tolist(), ids.tolist()):
            names = {"\n": "newline", " ": "space"}
            assert glyph == names.get(made["chars"][i], f"“{made['chars'][i]}”")
            said = 0 if share == "left out" else float(share.strip("%")) / 100
            assert abs(said - p) < 0.0051 and (share == "left out") == (p == 0)
        drawn = page.js("return [...Array(200)].map(() => sample_next(seen.logits, ...dials()))")
        assert set(drawn) <= {i for i, p in zip(ids.tolist(), probs.tolist()) if p > 0}
    assert len(set(drawn)) == 1  # temperature 0
    drawn = page.js("return [...Array(3000)].map(() => sample_next(seen.logits, 1))")
    common = int(logits.argmax())
    assert abs(drawn.count(common) / 3000 - logits.softmax(-1)[common]) < 0.05
    page.all("#bars button")[3].click()
    assert page.text == "The sea" + made["chars"][int(logits.argsort(descending=True)[3])]


def test_heads_and_lens_say_what_the_weights_say(page, made):
    """Against an explicit softmax in torch, for a character past the window."""
    text, model = made["text"][500:540], made["small"]
    page.begin(text[:20])
    page.begin(text)  # in two parts, neither of them longer than the window
    assert page.js("return start") == 0
    kept, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **options):
        kept.append((q @ k.mT / q.size(-1) ** 0.5).softmax(-1)[0, :, -1])  # (H, S), as a ring
        return plain(q, k, v, **options)

    gpt.F.scaled_dot_product_attention = watched
    try:
        read(model, gpt.encode(text, made["chars"]).tolist())
    finally:
        gpt.F.scaled_dot_product_attention = plain
    ring = torch.cat(kept[-3:]).roll(-(len(text) % 24), dims=-1)  # oldest first
    seen = torch.tensor(page.js("return seen.weights.flat().map(share => [...share])"))
    assert (seen - ring).abs().max() < 1e-4
    heads = page.all("#heads [role=radio]")
    names = [head.accessible_name for head in heads]
    assert names[4] == "layer 3, head 1 (line's start, <b>)" and "unfilled" not in str(names)
    assert [head.get_attribute("aria-checked") for head in heads].index("true") == 4
    for number, head in enumerate(heads):
        head.click()
        assert head.get_attribute("aria-checked") == "true"
        share, back = ring[number].max().item(), 23 - int(ring[number].argmax())
        said = page.the("#said").text
        place = "itself" if back == 0 else f", {back} back"
        assert said.startswith(head.accessible_name) and place in said.split(";")[0]
        assert abs(float(re.search(r"looks ([\d.]+)%", said)[1]) / 100 - share) < 0.0051
        depths = page.js("return marks.map(mark => mark.style.background)")
        assert [i for i, depth in enumerate(depths) if depth] == list(range(16, 40))
        assert "rgb(var(--heat) / 1.000)" in depths[39 - back]
    rows = page.all("#lens tr")
    assert len(rows) == 4
    final = [cell.text for cell in rows[-1].find_elements(By.TAG_NAME, "td")]
    page.dial("temperature", 1)
    assert final == [" ".join(bar) for bar in page.bars()[:4]]


def test_hovering_looks_without_moving(page):
    page.begin("The sea is wide")
    mark = page.all("#board [role=option]")[6]
    ActionChains(page.driver).move_to_element(mark).perform()
    assert "“a” looks" in page.the("#said").text and page.cursor == 14
    ActionChains(page.driver).move_to_element(page.the("h1")).perform()
    assert "“e” looks" in page.the("#said").text and page.cursor == 14


def test_keyboard_alone(page):
    """Every control can be reached by Tab, in order, and does its work from there."""
    def text_moves():
        for key, place in [(Keys.LEFT, 13), (Keys.HOME, 0), (Keys.DOWN, 7), (Keys.DOWN, 14),
                           (Keys.UP, 7), (Keys.UP, 0), (Keys.UP, 0), (Keys.RIGHT, 1),
                           (Keys.END, 14), (Keys.BACKSPACE, 13), (Keys.ENTER, 14)]:
            page.press(key)
            assert page.cursor == place, key
            assert page.js("return document.activeElement === marks[cursor]")

    def heads_move():
        for key, number in [(Keys.DOWN, 5), (Keys.LEFT, 3), (Keys.UP, 2), (Keys.RIGHT, 4)]:
            page.press(key)
            assert page.js("return heads.indexOf(document.activeElement)") == number
            assert page.js("return heads.findIndex(head => head.ariaChecked === 'true')") == number

    def a_new_beginning():
        control = ActionChains(page.driver).key_down(Keys.CONTROL).send_keys("a")
        control.key_up(Keys.CONTROL).perform()
        page.press("To sea,", Keys.ENTER, "my lord")
        assert page.text == "To sea,\nmy lord"

    def a_dial_turns():
        page.press(Keys.RIGHT, Keys.RIGHT)
        assert page.js("return $('#top_k').value") == "2"

    def a_bar_is_taken():
        if reached.count("BUTTON") == 2:
            page.press(Keys.ENTER)
            assert len(page.text) == 16

    def time_goes_on():
        page.press(Keys.RIGHT)
        assert page.the("#sample").text.startswith("10")

    acts = {"prompt": a_new_beginning, "option": text_moves, "top_k": a_dial_turns,
            "BUTTON": a_bar_is_taken, "radio": heads_move, "moment": time_goes_on}
    reached = []
    while len(reached) < 40 and "moment" not in reached:
        page.press(Keys.TAB)
        reached.append(page.js("const at = document.activeElement;"
                               "return at.id || at.getAttribute('role') || at.tagName"))
        acts.get(reached[-1], lambda: None)()
    assert [name for name in reached if name != "BUTTON"] == [
        "prompt", "run", "step", "back", "pace", "option", "temperature", "top_k", "top_p",
        "radio", "moment"]
    assert reached.count("BUTTON") == 12


def test_moments_show_their_text_as_it_is(page, made):
    for place, moment in enumerate(made["moments"]):
        page.dial("moment", place)
        assert page.js("return $('#sample').textContent") == moment["text"]
        assert f"{moment['val_loss']:.2f} nats" in page.the("#when").text
        assert page.the("#moment").get_attribute("aria-valuetext") == page.the("#when").text


def test_everything_has_a_name(page):
    controls = page.all("button, input, select, textarea, [role]:not([role=status])")
    assert len(controls) > 30
    for control in controls:
        assert control.accessible_name, control.get_attribute("outerHTML")
    for section in page.all("section"):
        assert len(section.find_element(By.TAG_NAME, "p").text) > 40 and section.accessible_name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(browser, made, scheme):
    page = Page(browser, made["outputs"] / "play.html", 390, 844)
    wish = [{"name": "prefers-color-scheme", "value": scheme}]
    page.command("Emulation.setEmulatedMedia", features=wish)
    page.command("Emulation.setTouchEmulationEnabled", enabled=True)
    page.begin(made["text"][:300])
    assert page.js("return document.documentElement.scrollWidth") <= 390
    for ground in page.js("return ['body', '#board', '#sample', '#step'].map(name => "
                          "getComputedStyle($(name)).backgroundColor)"):
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 600) == (scheme == "light")
    page.js("scrollTo(0, $('#look').offsetTop)")
    assert page.js("return board.getBoundingClientRect().top") == 0  # the text stays in sight
    page.js("scrollTo(0, 0); move(280)")
    x, y, width, height = page.js("const box = marks[290].getBoundingClientRect();"
                                  "return [box.x, box.y, box.width, box.height]")
    finger = [{"x": x + width / 2, "y": y + height / 2}]
    page.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=finger)
    page.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    WebDriverWait(browser, 10).until(lambda _: page.cursor == 290)
    page.command("Emulation.setTouchEmulationEnabled", enabled=False)
    page.command("Emulation.setEmulatedMedia", features=[])
    assert browser.get_log("browser") == []


def test_text_of_3500_symbols(browser, tmp_path):
    """Symbols beyond 16 bits, no newline among them, and no head with a role."""
    chars = "".join(map(chr, [*range(0x4E00, 0x4E00 + 3244), *range(0x1F300, 0x1F400)]))
    made = built(tmp_path, chars, chars[::7] * 3, {}, n_embd=16)
    page, ids = Page(browser, tmp_path / "play.html"), [5, 3300, 200, 7] * 8
    assert page.text == chars[:140:7]
    page.begin("".join(chars[i] for i in ids[:20]))
    page.begin("".join(chars[i] for i in ids))
    assert page.differs(read(made["small"], ids)[-1]) < 1e-3
    page.the("#step").click()
    assert len(page.text) == 33
    page.js("marks[32].focus()")
    for key, place in [(Keys.UP, 0), (Keys.DOWN, 32)]:
        page.press(key)
        assert page.cursor == place
    assert page.all("#heads div")[0].get_attribute("aria-checked") == "true"
    assert browser.get_log("browser") == []


def test_shown_in_place(browser, made, tmp_path):
    """Jupyter's output names the file; Colab's holds the page. A picture is shown if there is."""
    page, frame = made["outputs"] / "play.html", made["shown"][0].data
    assert f'src="{page.as_posix()}"' in frame and len(made["shown"]) == 1
    sys.modules["google.colab"] = sys
    try:
        (tmp_path / "play.png").write_bytes((ROOT / "outputs/block.png").read_bytes())
        scope = made | {"shown": [], "outputs": tmp_path}
        scope["display"] = lambda *shown: scope["shown"].extend(shown)
        exec(cells()[-1], scope)
    finally:
        del sys.modules["google.colab"]
    frame, picture, caption = scope["shown"]
    assert picture.format == "png" and "picture" in caption
    (tmp_path / "colab.html").write_text(f"<!doctype html>{frame.data}", "utf-8")
    page = Page(browser, tmp_path / "colab.html")
    browser.switch_to.frame(page.the("iframe"))
    page.the("#step").click()
    assert page.text.startswith("ROMEO:\n") and len(page.text) == 8
    browser.switch_to.default_content()
    assert browser.get_log("browser") == []


def test_saved_page(browser):
    path = ROOT / "outputs/play.html"
    if not path.exists():
        pytest.skip(f"no {path}: run the notebook")
    assert path.stat().st_size < 2_000_000
    page = Page(browser, path)
    page.js("for (let i = 0; i < 20; i++) step()")
    assert page.text and browser.get_log("browser") == []
