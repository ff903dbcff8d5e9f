"""Tiny Shakespeare is fetched from a server on this machine that makes every mistake in turn."""
import hashlib
import http.server
import os
import socket
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
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.pages, self.asked, self.together = {}, [], threading.Barrier(1)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        try:
            self.server.together.wait(60)
        except threading.BrokenBarrierError:
            return
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
    """A server at gpt.URL. The folder of gpt.TEXT holds a bundled play and no tiny Shakespeare."""
    site = Site()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(gpt, "URL", f"{site.url}/text")
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(RIGHT).hexdigest())
    monkeypatch.setattr(gpt, "TEXT", tmp_path / "data/tinyshakespeare.txt")
    play().parent.mkdir()
    play().write_bytes(b"play")
    threading.Thread(target=site.serve_forever, args=(0.02,), daemon=True).start()
    yield site
    site.together.abort()
    site.shutdown()
    site.server_close()
    socket.setdefaulttimeout(None)


def play():
    return gpt.TEXT.with_name("the_salt_tide.txt")


def kept():
    """The names of all files in data/."""
    return sorted(path.name for path in gpt.TEXT.parent.iterdir())


def moved(address):
    return 302, {"Location": address}, b""


def takes_the_play():
    """Whether the bundled play is read, and nothing else kept."""
    return gpt.load_text()[:2] == (play(), "alpy") and kept() == [play().name]


@pytest.mark.parametrize("page", [
    (200, {"Content-Length": 2 * len(RIGHT)}, RIGHT[:-1]),
    (200, {"Transfer-Encoding": "chunked"}, b"ffff\r\n" + RIGHT),
    (404, {}, RIGHT), (503, {}, RIGHT), (200, {"Content-Length": len(WRONG)}, b""),
    b"", b"no protocol at all\r\n\r\n",
    moved("ftp://127.0.0.1:9/text"), moved("gopher://127.0.0.1/"), moved("/text"),
    moved("http://["), moved("http://127.0.0.1:port/")],
    ids=["cut off", "cut off in a chunk", "missing", "out of order", "no body", "no answer",
         "nonsense", "to ftp", "to gopher", "in a circle", "to no address", "to no port"])
def test_a_failed_download_is_no_download(site, page):
    site.pages["/text"] = page
    assert takes_the_play()


def test_a_redirect_to_a_file_is_not_followed(site, tmp_path):
    """Not even to the right one."""
    (tmp_path / "right.txt").write_bytes(RIGHT)
    site.pages["/text"] = moved((tmp_path / "right.txt").as_uri())
    assert takes_the_play()


@pytest.mark.parametrize("body", [WRONG, RIGHT[:-1], RIGHT + b"\n", b""])
def test_another_text_is_not_kept_and_the_play_taken_with_a_notice(site, body, capsys):
    site.pages["/text"] = 200, {}, body
    assert takes_the_play()
    notice = capsys.readouterr().err
    assert f"taking {play()}" in notice and "hash" in notice and notice.count("\n") == 1


def test_a_network_that_never_answers_is_not_waited_for(site, monkeypatch, capsys):
    wait, given = socket.setdefaulttimeout, []
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: given.append(s) or wait(0.2))
    site.together = threading.Barrier(2)
    assert takes_the_play() and given == [20]
    assert "timed out" in capsys.readouterr().err


def test_without_network_the_play_and_without_the_play_one_error(site, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "URL", "http://127.0.0.1:9/text")
    assert takes_the_play()
    assert "refused" in capsys.readouterr().err
    play().unlink()
    with pytest.raises(OSError, match="the_salt_tide"):
        gpt.load_text()


def test_the_right_text_is_kept_and_not_fetched_again(site):
    site.pages |= {"/text": moved("/moved"), "/moved": (200, {}, RIGHT)}
    assert gpt.load_text()[0] == gpt.load_text()[0] == gpt.TEXT
    assert gpt.TEXT.read_bytes() == RIGHT and site.asked == ["/text", "/moved"]
    assert kept() == [play().name, gpt.TEXT.name]


def test_the_folder_is_made(site):
    site.pages["/text"] = 200, {}, RIGHT
    play().unlink()
    gpt.TEXT.parent.rmdir()
    assert gpt.load_text()[0] == gpt.TEXT and kept() == [gpt.TEXT.name]


def test_a_text_of_ones_own_asks_no_network(site, text_file):
    assert gpt.load_text(str(text_file))[0] == text_file
    assert site.asked == [] and kept() == [play().name]


def test_two_processes_may_fetch_at_once(site):
    """The server answers only when both have asked."""
    site.together = threading.Barrier(2)
    site.pages["/text"] = 200, {}, RIGHT
    script = (f"import gpt, pathlib; gpt.URL, gpt.SHA256 = {gpt.URL!r}, {gpt.SHA256!r}; "
              f"gpt.TEXT = pathlib.Path({str(gpt.TEXT)!r}); "
              "print(gpt.load_text()[0].read_bytes().count(b'Speak'))")
    both = [subprocess.Popen([sys.executable, "-c", script], text=True, stdout=subprocess.PIPE,
                             env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["1000\n"] * 2
    assert gpt.TEXT.read_bytes() == RIGHT and kept() == [play().name, gpt.TEXT.name]
