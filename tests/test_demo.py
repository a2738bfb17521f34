"""The page that shows what a run changed: what it samples, what it hides, and how it looks in a browser."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from erase_sd.common.errors import UserError
from erase_sd.demo import POLICY, Comparison, OwnFilesOnly, PageSettings, SideBySide, compare, main, serve, shown
from erase_sd.models.pipeline import load, sample
from erase_sd.pocket import FOLDER
from tests.browser import Browser, found

CONFIG = {"concept": ["watermelon"], "model": "pocket", "kind": "auto", "anchor": [], "seed": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the pocket model whose network is a changed copy of the original."""
    folder = tmp_path_factory.mktemp("runs") / "watermelon"
    shutil.copytree(FOLDER / "unet", folder / "unet")
    (folder / "run.json").write_text(json.dumps({"config": CONFIG}))
    (folder / "status.json").write_text('{"state": "complete", "code": 0}')
    return folder


@pytest.fixture(scope="module")
def comparison(run: Path) -> Comparison:
    return compare(PageSettings(run=str(run), steps=1))


def test_the_run_says_how_it_samples_and_what_to_ask(run: Path, comparison: Comparison) -> None:
    assert comparison.concepts == ("watermelon",)
    assert comparison.guidance == 3.5
    assert comparison.examples[0].startswith("a watermelon")


def test_both_models_sample_the_same_prompt_from_the_same_noise(comparison: Comparison) -> None:
    pair = comparison.pair("  a  cat ", 3)
    wanted = sample(load(str(FOLDER)), ["a cat"], [3], steps=1, guidance=3.5)[0]
    assert pair.before.tobytes() == wanted.tobytes()
    assert pair.after.tobytes() == wanted.tobytes()  # the run's weights are the original's


def test_the_second_picture_is_the_erased_networks(comparison: Comparison) -> None:
    layer = comparison.erased.unet.conv_out
    before = comparison.pair("a cat", 3)
    kept = layer.weight.data.clone()
    layer.weight.data.zero_()
    after = comparison.pair("a cat", 3)
    layer.weight.data.copy_(kept)
    assert after.before.tobytes() == before.before.tobytes()
    assert after.after.tobytes() != before.after.tobytes()


@pytest.mark.parametrize(("prompt", "seed", "said"), [(" \n", 0, "prompt is empty"), ("a cat", -1, "no whole number")])
def test_what_cannot_be_sampled_is_one_sentence(comparison: Comparison, prompt: str, seed: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        comparison.pair(prompt, seed)


def test_a_cleared_seed_is_one_sentence(comparison: Comparison) -> None:
    with pytest.raises(UserError, match="no whole number"):
        comparison.pair("a cat", None)


@pytest.mark.parametrize(
    ("concepts", "prompt", "sensitive"),
    [(("cat",), "a cat", ""), (("cat",), "a naked person", "the prompt"), (("nudity",), "a cat", "this run")],
)
def test_what_is_sensitive(concepts: tuple[str, ...], prompt: str, sensitive: str) -> None:
    asked = Comparison(original=None, erased=None, concepts=concepts, examples=(), steps=1, guidance=1)
    assert asked.sensitive(prompt).startswith(sensitive)
    assert bool(asked.sensitive(prompt)) == bool(sensitive)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def colours(image: Image.Image) -> int:
    return len(image.getcolors(1 << 20))


def test_sensitive_pictures_are_hidden_until_the_switch_is_moved() -> None:
    pair = SideBySide(noise(), noise(), "the prompt is about nudity")
    before, after, note = shown(pair, hide=True)
    assert colours(before) <= 64
    assert colours(after) <= 64
    assert note.startswith("Hidden")
    before, after, note = shown(pair, hide=False)
    assert colours(before) > 1000
    assert colours(after) > 1000


def test_other_pictures_are_shown_as_they_are() -> None:
    before, _, note = shown(SideBySide(noise(), noise(), ""), hide=True)
    assert colours(before) > 1000
    assert note == ""


def test_without_gradio_it_is_said_how_to_get_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'erase-sd\[demo\]'"):
        serve(PageSettings(run=str(run)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "0"], "--port 0 is no port"),
        (["--steps", "0"], "--steps 0 is too small"),
        (["--guidance", "-1"], "--guidance -1.0 is too small"),
    ],
)
def test_a_bad_option_is_one_sentence(run: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main([str(run), *words])


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no run.json"):
        compare(PageSettings(run=str(tmp_path)))


def test_a_record_without_its_base_is_one_sentence(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="does not say what its base was: give --model"):
        compare(PageSettings(run=str(tmp_path / "run")))


def test_a_mistake_exits_with_2(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "erase_sd.demo", str(tmp_path / "gone")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_every_answer_forbids_the_browser_other_machines() -> None:
    sent: list[dict] = []

    async def answer(scope: dict, receive: object, send: Callable) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(OwnFilesOnly(answer)({}, None, send))
    assert sent[0]["headers"] == [(b"a", b"b"), (b"content-security-policy", POLICY.encode())]
    assert sent[1] == {"type": "http.response.body", "body": b"page"}
    assert "http" not in POLICY


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """The page, served by the command itself."""
    if find_spec("gradio") is None or found() is None:
        pytest.skip("needs gradio and Chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "erase_sd.demo", str(run), "--steps", "1", "--port", str(port)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    said = process.stdout.readline()
    assert said == f"http://127.0.0.1:{port} until Ctrl-C\n"
    yield said.split()[0]
    process.send_signal(signal.SIGINT)
    process.wait(60)


PICTURES = "document.querySelectorAll('.picture img').length == 2"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(address: str, width: int, tmp_path: Path) -> None:
    with Browser() as browser:
        browser.open(address, width)
        browser.wait("document.getElementById('sample')")
        browser.run("document.getElementById('sample').click()")
        browser.wait(PICTURES)
        browser.wait("[...document.querySelectorAll('.picture img')].every(img => img.complete)")
        browser.screenshot(Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"page-{width}.png")
        tops = browser.run("[...document.querySelectorAll('.picture img')].map(x => x.getBoundingClientRect().top)")
        widths = browser.run(
            "[...document.querySelectorAll('.picture img')].map(x => x.getBoundingClientRect().width)"
        )
        assert tops[0] == tops[1]  # side by side
        assert min(widths) > width / 4
        assert browser.run("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
        assert browser.said == []
        away = []
        for asked in browser.asked:
            if not asked.startswith((address, "data:", "blob:")):
                away.append(asked)
        assert away == []


@pytest.mark.slow
def test_the_page_is_served_to_this_machine_only(address: str) -> None:
    port = int(address.rpartition(":")[2])
    places = set()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            places.add(connection.laddr.ip)
    assert places == {"127.0.0.1"}


@pytest.mark.slow
def test_the_switch_hides_what_a_sensitive_prompt_gives(address: str) -> None:
    field = "document.querySelector('textarea')"
    with Browser() as browser:
        browser.open(address, 1280)
        browser.wait("document.getElementById('sample')")
        browser.run(f"{field}.value = 'a naked cat'; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        browser.run("document.getElementById('sample').click()")
        browser.wait("document.getElementById('note').innerText.startsWith('Hidden')")
        browser.run("document.querySelector('input[type=checkbox]').click()")
        browser.wait("document.getElementById('note').innerText.startsWith('Shown')")
