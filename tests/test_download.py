"""Tiny Shakespeare is fetched from a server on this machine that makes every mistake in turn."""
import hashlib
import http.server
import os
import subprocess
import sys
import threading

import pytest

import gpt
from conftest import ROOT

RIGHT = b"Speak, speak.\n" * 1000
WRONG = b"<html>Sign in to the hotel's network</html>"


class Site(http.server.ThreadingHTTPServer):
    """Answers each path with what `pages` holds: (status, headers, body), or raw bytes."""
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.pages, self.asked, self.together = {}, [], threading.Barrier(1)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.together.wait(60)
        page = self.server.pages[self.path]
        if isinstance(page, bytes):
            self.wfile.write(page)
            return
        status, headers, body = page
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server at gpt.URL. The working directory has the bundled play and no tiny Shakespeare."""
    site = Site()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(gpt, "URL", f"{site.url}/text")
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(RIGHT).hexdigest())
    gpt.write(gpt.BUNDLED, b"play")
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site
    site.shutdown()
    site.server_close()


def kept():
    """The names of all files in data/."""
    return sorted(path.name for path in gpt.TEXT.parent.iterdir())


def moved(address):
    return 302, {"Location": address}, b""


@pytest.mark.parametrize("page", [
    (200, {"Content-Length": 2 * len(RIGHT)}, RIGHT),
    (200, {"Transfer-Encoding": "chunked"}, b"ffff\r\n" + RIGHT),
    (404, {}, RIGHT), (503, {}, RIGHT), (200, {"Content-Length": len(WRONG)}, b""),
    b"", b"no protocol at all\r\n\r\n",
    moved("ftp://127.0.0.1:9/text"), moved("gopher://127.0.0.1/"), moved("/text"),
    moved("http://["), moved("http://127.0.0.1:port/")],
    ids=["cut off", "cut off in a chunk", "missing", "out of order", "no body", "no answer",
         "nonsense", "to ftp", "to gopher", "in a circle", "to no address", "to no port"])
def test_a_failed_download_is_no_download(site, page):
    site.pages["/text"] = page
    assert gpt.find_text() == gpt.BUNDLED
    assert kept() == [gpt.BUNDLED.name]


def test_a_redirect_to_a_file_is_not_followed(site, tmp_path):
    """Not even to the right one."""
    (tmp_path / "right.txt").write_bytes(RIGHT)
    site.pages["/text"] = moved((tmp_path / "right.txt").as_uri())
    assert gpt.find_text() == gpt.BUNDLED
    assert kept() == [gpt.BUNDLED.name]


@pytest.mark.parametrize("body", [WRONG, RIGHT[:-1], RIGHT + b"\n", b""])
def test_another_text_is_refused_and_not_kept(site, body):
    site.pages["/text"] = 200, {}, body
    with pytest.raises(gpt.UserError, match="SHA-256"):
        gpt.find_text()
    assert kept() == [gpt.BUNDLED.name]


def test_the_right_text_is_kept_and_not_fetched_again(site):
    site.pages |= {"/text": moved("/moved"), "/moved": (200, {}, RIGHT)}
    assert gpt.find_text() == gpt.find_text() == gpt.TEXT
    assert gpt.TEXT.read_bytes() == RIGHT and site.asked == ["/text", "/moved"]
    assert kept() == [gpt.BUNDLED.name, gpt.TEXT.name]


def test_two_processes_may_fetch_at_once(site, tmp_path):
    """The server answers only when both have asked."""
    site.together = threading.Barrier(2)
    site.pages["/text"] = 200, {}, RIGHT
    script = (f"import gpt; gpt.URL, gpt.SHA256 = {gpt.URL!r}, {gpt.SHA256!r}; "
              "print(gpt.find_text().read_bytes().count(b'Speak'))")
    both = [subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
            for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["1000\n"] * 2
    assert gpt.TEXT.read_bytes() == RIGHT and kept() == [gpt.BUNDLED.name, gpt.TEXT.name]
