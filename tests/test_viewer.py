"""The attention viewer of chapter 11 in a real browser: moved by keyboard and pointer, it must say
what the weights say. Skipped where there is no Chromium."""
import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch

from conftest import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason=f"no browser: {', '.join(NAMES)}")

WATCH = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("unhandledrejection", event => errors.push(String(event.reason)));
</script>
"""
DRIVE = """<script>
const steps = [], roots = [...document.querySelectorAll(".gpt-viewer")];
roots.forEach((root, viewer) => {
  const [layer, head] = root.querySelectorAll("select");
  const marks = [...root.querySelectorAll("[role=radio]")];
  const checked = () => marks.findIndex(mark => mark.getAttribute("aria-checked") === "true");
  const note = action => steps.push({viewer, action, layer: +layer.value, head: +head.value,
    chosen: checked(), focus: marks.indexOf(document.activeElement),
    stops: marks.filter(mark => mark.tabIndex === 0).length, label: marks[checked()].ariaLabel,
    outline: getComputedStyle(marks[checked()]).outlineStyle,
    text: root.querySelector("[aria-live]").textContent});
  const press = key => {
    const event = new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true});
    marks[checked()].dispatchEvent(event);
    note(key + (event.defaultPrevented ? "" : " (left alone)"));
  };
  const pick = (select, value) => {
    select.value = value;
    select.dispatchEvent(new Event("change", {bubbles: true}));
    note("select");
  };
  note("start");
  marks[checked()].focus();
  for (let i = 0; i < layer.options.length; i++) for (let j = 0; j < head.options.length; j++) {
    pick(layer, i);
    pick(head, j);
    ["Home", "ArrowLeft", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowUp", "a", "End",
     "ArrowRight", "ArrowLeft", "ArrowLeft"].forEach(press);
  }
  marks[3].scrollIntoView();
  const box = marks[3].getBoundingClientRect();
  marks[3].dispatchEvent(new PointerEvent("pointermove", {bubbles: true,
    clientX: box.left + box.width / 2, clientY: box.top + box.height / 2}));
  note("pointer");
});
const pre = document.body.appendChild(document.createElement("pre"));
pre.id = "results";
pre.textContent = JSON.stringify({errors, steps});
</script>
"""


def built():
    """Weights (2, 3, 9, 9), their passage, and a page with the notebook's viewer twice."""
    cells = json.loads((ROOT / "gpt_from_scratch.ipynb").read_text(encoding="utf-8"))["cells"]
    scope = {"html": html, "json": json}
    for cell in cells:
        source = "".join(cell["source"])
        if source.startswith(("STYLE = ", "SCRIPT ")) or "def viewer(" in source:
            exec(source, scope)
    scores = 3 * torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    passage = "a\"<&'\n bé"
    part = scope["viewer"](passage, weights)
    return weights, passage, f"<!doctype html>\n<meta charset=utf-8>\n{part}\n{part}\n"


def data_of(page):
    """Passage and weights that a page holds."""
    words, numbers = (re.search(f'data-{name}="(.*?)"', page, re.DOTALL).group(1)
                      for name in ("text", "weights"))
    return json.loads(html.unescape(words)), json.loads(numbers)


def drive(page, folder):
    """What the viewers of a page say while they are moved."""
    path = folder / "page.html"
    path.write_text(page.replace("<!doctype html>\n", f"<!doctype html>\n{WATCH}") + DRIVE, "utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
         "--window-size=800,1200", "--dump-dom", path.as_uri()],
        capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    results = re.search('<pre id="results">(.*?)</pre>', done.stdout, re.DOTALL)
    assert results, done.stdout[-2000:]
    results = json.loads(html.unescape(results.group(1)))
    assert results["errors"] == []
    return results["steps"]


def said(passage, weights, layer, head, chosen):
    """The sentence that belongs to a choice, from the weights in thousandths."""
    def name(i):
        return {"\n": "newline", " ": "space"}.get(passage[i], f'"{passage[i]}"')

    row = weights[layer][head][chosen]
    most = sorted(range(len(row)), key=lambda i: (-row[i], i))[:4]
    parts = [f"{math.floor(row[i] / 10 + 0.5)} % at "
             + ("itself" if i == chosen else f"{name(i)} ({chosen - i} back)") for i in most]
    return f"layer {layer + 1}, head {head + 1}: {name(chosen)} looks {', '.join(parts)}"


def check(page, folder):
    """Drive every viewer of a page and compare each step with the weights."""
    passage, weights = data_of(page)
    last, moves = len(passage) - 1, {"Home": -10**6, "End": 10**6, "ArrowLeft": -1, "ArrowUp": -1,
                                     "ArrowRight": 1, "ArrowDown": 1}
    steps, chosen = drive(page, folder), last
    assert {step["viewer"] for step in steps} == set(range(page.count("<div class=\"gpt-viewer\"")))
    for step in steps:
        if step["action"] in ("start", "pointer"):
            chosen = last if step["action"] == "start" else 3
        else:
            assert step["focus"] == chosen or step["action"] in moves
            chosen = min(last, max(0, chosen + moves.get(step["action"], 0)))
            assert step["focus"] == chosen, step
        assert step["chosen"] == chosen and step["stops"] == 1, step
        assert step["text"] == said(passage, weights, step["layer"], step["head"], chosen), step
        assert step["text"].split(": ")[1].startswith(step["label"] + " looks"), step
        assert step["outline"] == "solid", step
    actions = {*moves, "start", "pointer", "select", "a (left alone)"}
    assert {step["action"] for step in steps} == actions
    assert {(step["layer"], step["head"]) for step in steps} == {
        (i, j) for i, layer in enumerate(weights) for j in range(len(layer))}
    assert len({step["text"] for step in steps}) > len(steps) / 4


def test_page_holds_the_weights_and_nothing_from_outside():
    weights, passage, page = built()
    shown, numbers = data_of(page)
    assert shown == passage
    for i, j, t in torch.cartesian_prod(*map(torch.arange, weights.shape[:3])).tolist():
        stored = torch.tensor(numbers[i][j][t]) / 1000
        assert torch.allclose(stored, weights[i, j, t, :t + 1], atol=6e-4)
    assert "http" not in page and "src=" not in page and " id=" not in page


@needs_browser
def test_viewer_twice_in_a_page(tmp_path):
    check(built()[2], tmp_path)


@needs_browser
def test_saved_page(tmp_path):
    page = ROOT / "outputs/attention_viewer.html"
    if not page.exists():
        pytest.skip(f"no {page}: run the notebook")
    assert page.stat().st_size < 300_000
    check(page.read_text(encoding="utf-8"), tmp_path)
