"""A page in the browser that shows what a run changed: `python -m erase_sd.demo runs/cat`.

A prompt and a seed are sampled by the original model and by the erased one, side by side. Both are loaded once. The
page is served on this machine only, asks no other machine for anything, and sends nothing to anybody.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

import prompts
from erase_sd.common.cli import argument, at_least, command, filled, knob, names, quiet, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.imaging import pixelate
from erase_sd.denoising.concept import resolve
from erase_sd.export import check_same_kind, erased_part, place, read_record
from erase_sd.exports.base import with_network
from erase_sd.models.checks import check_weights
from erase_sd.models.families import family, modules, network
from erase_sd.models.pipeline import load, load_network, sample
from erase_sd.settings import Job

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from gradio import Blocks

HOST = "127.0.0.1"
LAST_SEED = 2**32 - 1
LEAST = 384  # pixels of a picture on the page, at least
# What the page may load, as the browser enforces it: gradio's own files and the pictures.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
)
FONTS = ("system-ui", "sans-serif")  # gradio's own come from Google
STYLE = """
.gradio-container { max-width: 64rem !important; margin: 0 auto !important; }
.picture img { width: 100%; height: auto; }
.heading { text-align: center; }
"""


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """Which run the page shows, how it samples, and where it is served."""

    run: str = argument("folder of a finished run, or with --model any folder with a network")
    model: str | None = knob(None, "the base: folder, Hub id, .safetensors file or 'pocket' (default: the run's own)")
    model_config: str | None = knob(None, "how a single-file base is laid out: folder or Hub id")
    steps: int | None = knob(None, "denoising steps of a picture (default: as in the run's before_after.png)")
    guidance: float | None = knob(None, "classifier-free guidance scale (default: as in before_after.png)")
    port: int = knob(7860, "the page is http://127.0.0.1:PORT")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        if self.steps is not None:
            at_least(self, 1, "steps")
        if self.guidance is not None:
            at_least(self, 0, "guidance")
        if not 1 <= self.port <= 65535:
            raise UserError(f"--port {self.port} is no port: give a number from 1 to 65535")


class SideBySide(NamedTuple):
    """One prompt and seed, sampled by both models."""

    before: Image.Image
    after: Image.Image
    sensitive: str  # why the pictures are hidden until the switch is moved, "" for pictures that are not


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The original model and the erased one, loaded and ready to be asked."""

    original: DiffusionPipeline
    erased: DiffusionPipeline
    concepts: tuple[str, ...]
    examples: tuple[str, ...]  # prompts to begin with
    steps: int
    guidance: float
    size: int | None = None  # pixels a side

    def pair(self, prompt: str, seed: float | None) -> SideBySide:
        """Sample the prompt by both models from the same noise. Raises UserError for no prompt and for no seed."""
        prompt = " ".join(prompt.split())
        if not prompt:
            raise UserError("The prompt is empty: write what the picture should show.")
        if seed is None or seed != int(seed) or not 0 <= seed <= LAST_SEED:
            raise UserError(f"The seed is no whole number from 0 to {LAST_SEED}: give one.")
        pictures = []
        for pipe in (self.original, self.erased):
            pictures += sample(pipe, [prompt], [int(seed)], steps=self.steps, guidance=self.guidance, size=self.size)
        return SideBySide(*pictures, self.sensitive(prompt))

    def sensitive(self, prompt: str) -> str:
        """Return why the pictures of a prompt may be sensitive, "" if neither the run nor the prompt says so."""
        nudity = prompts.load("nudity")
        for concept in self.concepts:
            if nudity.names(concept):
                return "this run is about nudity"
        return "the prompt is about nudity" if nudity.names(prompt) else ""


def compare(settings: PageSettings) -> Comparison:
    """Load the run and its base, once. Raises UserError for what is no finished run, or does not fit its base."""
    folder = Path(settings.run)
    record = read_record(folder, settings.model)
    part = erased_part(folder)
    config = record.get("config", {})
    model = settings.model or config.get("model")
    if model is None:
        raise UserError(f"the record of {folder} does not say what its base was: give --model")
    quiet()
    pipe = load(place(model), config=settings.model_config or config.get("model_config"))
    if family(pipe).part != part:
        raise UserError(f"{folder} holds a {part} and {model} a {family(pipe).part}: give the run's own base")
    erased = load_network(str(folder), part, torch.float32)
    check_weights(erased, part, str(folder))
    check_same_kind(network(pipe), erased, model, folder)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    for module in (*modules(pipe).values(), erased):
        module.to(device)
    sampling = _sampling(config, folder)
    for name in ("steps", "guidance"):
        if getattr(settings, name) is not None:
            sampling[name] = getattr(settings, name)
    return Comparison(original=pipe, erased=with_network(pipe, part, erased), **sampling)


def _sampling(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return how the run sampled its own pictures before and after; the defaults for a network without a record."""
    if not config:
        return {"concepts": (folder.name,), "examples": (), "steps": Job().picture_steps, "guidance": 7.5}
    values = {}
    for name in names(Job) & config.keys():
        values[name] = tuple(config[name]) if isinstance(config[name], list) else config[name]
    target = resolve(filled(Job, values), config.get("resolution"))
    return {
        "concepts": target.names,
        "examples": target.shown,
        "steps": target.steps,
        "guidance": target.guidance,
        "size": target.size,
    }


def page(comparison: Comparison) -> Blocks:
    """Return the page, not yet served. What is hidden is pixelated here: the browser never gets the other picture."""
    import gradio

    concepts = ", ".join(comparison.concepts)

    def ask(prompt: str, seed: float | None, hide: bool) -> tuple[SideBySide, Image.Image, Image.Image, str]:
        try:
            pair = comparison.pair(prompt, seed)
        except UserError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error
        return pair, *shown(pair, hide)

    with gradio.Blocks(title=f"{concepts} erased", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gradio.Markdown(f"# Before and after erasing {_plain(concepts)}\n\nThe same prompt and noise for both models.")
        prompt = gradio.Textbox(label="Prompt", value=next(iter(comparison.examples), ""), max_length=1000)
        with gradio.Row():
            seed = gradio.Number(label="Seed", value=0, precision=0, minimum=0, maximum=LAST_SEED, min_width=120)
            hide = gradio.Checkbox(label="Hide sensitive pictures", value=True, min_width=120)
        button = gradio.Button("Sample", variant="primary", elem_id="sample")
        note = gradio.Markdown("", elem_id="note")
        with gradio.Row():
            before, after = _picture("Original"), _picture("Erased")
        if comparison.examples:
            gradio.Examples([[text] for text in comparison.examples[::2]], prompt, label="Prompts of the run")
        latest = gradio.State(None)
        gradio.on(
            [button.click, prompt.submit],
            ask,
            [prompt, seed, hide],
            [latest, before, after, note],
            concurrency_limit=1,  # one model, one picture at a time
            api_visibility="private",
        )
        hide.change(shown, [latest, hide], [before, after, note], api_visibility="private")
    return blocks


def shown(pair: SideBySide | None, hide: bool) -> tuple[Image.Image | None, Image.Image | None, str]:
    """Return both pictures as the page shows them, and the line above them."""
    if pair is None:
        return None, None, ""
    before, after, note = pair.before, pair.after, ""
    if pair.sensitive and hide:
        before, after = pixelate(before), pixelate(after)
        note = f"Hidden, since {pair.sensitive}: the switch shows them."
    elif pair.sensitive:
        note = f"Shown although {pair.sensitive}."
    return _enlarged(before), _enlarged(after), note


def _enlarged(image: Image.Image) -> Image.Image:
    """Return a small picture with larger pixels: a browser would smooth them."""
    times = max(1, LEAST // image.width)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _picture(heading: str) -> Any:
    """Return the place of one picture, half as wide as the page even on a phone."""
    import gradio

    with gradio.Column(min_width=120):
        gradio.Markdown(f"**{heading}**", elem_classes="heading")
        return gradio.Image(
            label=heading,
            show_label=False,
            format="png",
            type="pil",
            interactive=False,
            buttons=["download"],
            elem_classes="picture",
        )


def _plain(text: str) -> str:
    """Return a concept as Markdown that shows it and nothing else."""
    return re.sub(r"[^\w\s,.-]", lambda match: f"&#{ord(match[0])};", text)


class OwnFilesOnly:
    """ASGI middleware: every answer tells the browser to load nothing from another machine."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer by the page, and add the policy to the headers."""

        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(settings: PageSettings) -> None:
    """Load both models and serve the page until Ctrl-C. Raises UserError for bad input, before anything is loaded."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install 'erase-sd[demo]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    comparison = compare(settings)

    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),  # no page of another name may ask it
        Middleware(OwnFilesOnly),
    ]
    try:
        blocks = page(comparison)
        blocks.launch(
            server_name=HOST,
            server_port=settings.port,
            share=False,
            quiet=True,  # it would advise to share the page
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gradio.themes.Default(font=FONTS, font_mono=("monospace",)),
            css=STYLE,
            app_kwargs={"middleware": middleware},
        )
    except OSError as error:
        raise UserError(f"--port {settings.port} cannot be used ({error}): give another one") from error
    print(f"http://{HOST}:{settings.port} until Ctrl-C", flush=True)
    blocks.block_thread()


main = command("python -m erase_sd.demo", "Show what a run changed, on a page in the browser.", PageSettings, serve)

if __name__ == "__main__":
    run_main(main)
