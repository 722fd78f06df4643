"""The page itself, in Gradio: what stands where, and which button calls which handler.

Uploads come as files and are read by `Handlers.read` alone: Gradio's own picture components would decode what is given
to them, so they only show pictures here.
"""

import functools
import html
from collections.abc import Callable
from typing import Any

import gradio as gr
import gradio.themes
from gradio.components import Component

from pipelines.drawing.edits import MASK_NAMES, cells_to_redraw, named_mask
from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.page.app_handlers import ALL_CLASSES, BRUSHED, NO_CLASS, Handlers, Picture, draw_codes, enlarge
from stage2_prior.sampling import SamplingConfig
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_pil

__all__ = ["CSS", "THEME", "build_page"]

MAX_IMAGES = 100
PICTURE_FILES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"]
THEME = gradio.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
"""System fonts only: Gradio's others may be fetched from elsewhere."""
CSS = """
.pixels img { image-rendering: pixelated; object-fit: contain !important; }
.pixels .grid-wrap { margin-top: 26px; }
.pixels .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
.pixels .caption-label { font-size: 11px; padding: 0 5px; }
.shown img { box-sizing: border-box; padding-top: 28px; object-fit: contain !important; }
"""
"""Galleries show small pictures with square pixels, all columns in sight; no label lies over a picture."""
BRUSH = "#e11d48"
PROGRESS = gr.Progress()
"""As a default, it asks Gradio for one that shows on the page."""

Event = Callable[..., Any]


def build_page(pipeline: TwoStagePipeline, name: str) -> gr.Blocks:
    """The page for a pipeline: only the tabs and controls that it has.

    Args:
        name: what the model is called on it.
    """
    handlers = Handlers(pipeline)
    with gr.Blocks(title=f"{name} - twostage", analytics_enabled=False) as page:
        gr.Markdown(f"# {name}\n{describe(pipeline)}")
        generated, selected = gr.State([]), gr.State(None)
        with gr.Tab("Generate"):
            _generate_tab(handlers, generated, selected)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(handlers)
        if pipeline.prior:
            with gr.Tab("Inpaint"):
                _inpaint_tab(handlers, generated, selected)
        with gr.Tab("Interpolate"):
            _interpolate_tab(handlers, generated, selected)
    # One model, one piece of work at a time.
    page.queue(default_concurrency_limit=1)
    return page


def describe(pipeline: TwoStagePipeline) -> str:
    """The model's facts in a line."""
    tokenizer, (height, width) = pipeline.tokenizer, pipeline.image_size
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[pipeline.channels]
    names = pipeline.class_names
    facts = [
        f"{height} x {width} {kind} images",
        f"{len(names)} classes" if names else "no classes",
    ]
    if pipeline.prior:
        rows, columns = tokenizer.code_grid
        model = pipeline.prior.config.model.type.replace("_", " ")
        facts = [f"{model} over {rows} x {columns} codes of {tokenizer.codebook_size}", *facts]
    else:
        latent = " x ".join(map(str, tokenizer.latent_shape))
        facts = [f"variational autoencoder with a latent of {latent}", *facts]
    return " · ".join(facts)


# --- the tabs -------------------------------------------------------------------------------------------------------


def _generate_tab(handlers: Handlers, generated: gr.State, selected: gr.State) -> None:
    names = handlers.pipeline.class_names
    columns = len(names) if names and 4 <= len(names) <= 12 else 8
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            # A name that is not there gets our own sentence, with the nearest one.
            class_name = gr.Dropdown(
                [ALL_CLASSES, *(names or [])], label="Class", allow_custom_value=True, visible=bool(names)
            )
            num_images = gr.Slider(1, MAX_IMAGES, 2 * columns, step=1, label="Number of images")
            seed, controls = _seed_box(), _sampling_controls(handlers.pipeline)
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2):
            gallery = _gallery("Generated", columns, height=480)

    def generate(progress: gr.Progress = PROGRESS, *given: Any) -> tuple[list[Any], list[Picture], None]:
        count, name, number, *sampling = given
        pictures = handlers.generate(count, name, number, _named(controls, sampling), _shown(progress))
        return [(to_pil(p.pixels), p.class_name) for p in pictures], pictures, None

    _on(button.click, generate, [num_images, class_name, seed, *controls.values()], [gallery, generated, selected])

    def select(event: gr.SelectData) -> int:
        return event.index

    gallery.select(select, None, selected, api_visibility="private")


def _reconstruct_tab(handlers: Handlers) -> None:
    pipeline = handlers.pipeline
    upload, note = _upload_button("Upload a picture"), gr.Markdown()
    with gr.Row():
        given, back = _picture("Your picture, as the model sees it"), _picture("Its reconstruction")
        rows, columns = pipeline.tokenizer.code_grid
        codes = _picture(f"Its codes: {rows} x {columns} of {pipeline.tokenizer.codebook_size}", bool(pipeline.prior))

    def reconstruct(path: str) -> tuple[Any, ...]:
        picture = handlers.read(path)
        pixels, indices, quality = handlers.reconstruct(picture)
        drawn = None if indices is None else draw_codes(indices, pipeline.tokenizer.codebook_size or 0)
        return enlarge(picture.pixels), enlarge(pixels), drawn, f"{picture.note} {quality}"

    _on(upload.upload, reconstruct, [upload], [given, back, codes, note])


def _inpaint_tab(handlers: Handlers, generated: gr.State, selected: gr.State) -> None:
    pipeline = handlers.pipeline
    assert pipeline.prior
    kept = {name: ~cells_to_redraw(pipeline.tokenizer, named_mask(name, pipeline.image_size)) for name in MASK_NAMES}
    possible = [name for name, cells in kept.items() if pipeline.prior.can_keep(cells[None])]
    start = BRUSHED if len(possible) == len(MASK_NAMES) or not possible else possible[0]
    names = pipeline.class_names or []
    choices = [NO_CLASS, *names] if pipeline.prior.config.loss.class_dropout_prob or not names else names
    picture = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            with gr.Row():
                upload, take = _upload_button("Upload a picture"), gr.Button("Take a generated one", size="sm")
            note = gr.Markdown()
            # A prior that writes one code after another cannot redraw every part: start with one that it can.
            part = gr.Dropdown([BRUSHED, *MASK_NAMES], value=start, label="Draw again")
            class_name = gr.Dropdown(choices, label="Class", allow_custom_value=True, visible=bool(names))
            num_images = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Number of completions")
            feather = gr.Slider(0, 8, 0, step=1, label="Feather in pixels", info="How far what is kept blends in.")
            seed, controls = _seed_box(), _sampling_controls(pipeline)
            button = gr.Button("Inpaint", variant="primary")
        with gr.Column(scale=2):
            editor = gr.ImageEditor(
                label="Brush over what is to be drawn again",
                type="numpy",
                format="png",
                sources=[],
                transforms=[],
                layers=False,
                brush=gr.Brush(default_size=28, colors=[BRUSH], color_mode="fixed"),
                eraser=gr.Eraser(default_size=28),
                buttons=[],
                height=480,
            )
            gallery = _gallery("Completions", 8, height=260)

    def show(chosen: Picture) -> tuple[Any, ...]:
        shown = enlarge(chosen.pixels)
        value = {"background": shown, "layers": [], "composite": shown}
        return chosen, value, chosen.note, chosen.class_name or (NO_CLASS if NO_CLASS in choices else names[0])

    outputs = [picture, editor, note, class_name]
    _on(upload.upload, lambda path: show(handlers.read(path)), [upload], outputs)
    _on(take.click, lambda pictures, index: show(_taken(pictures, index, 0)), [generated, selected], outputs)

    def inpaint(progress: gr.Progress = PROGRESS, *given: Any) -> list[Any]:
        chosen, edited, which, count, name, number, width, *sampling = given
        layers = edited["layers"] if edited else []
        settings = _named(controls, sampling)
        images = handlers.inpaint(chosen, layers, which, count, name, number, width, settings, _shown(progress))
        return [to_pil(pixels) for pixels in images]

    inputs = [picture, editor, part, num_images, class_name, seed, feather, *controls.values()]
    _on(button.click, inpaint, inputs, [gallery])


def _interpolate_tab(handlers: Handlers, generated: gr.State, selected: gr.State) -> None:
    ends = []
    with gr.Row():
        for place, word in enumerate(("first", "second")):
            with gr.Column():
                picture, shown = gr.State(), _picture(f"The {word}", height=300)
                with gr.Row():
                    upload = _upload_button(f"Upload the {word}")
                    take = gr.Button("Take a generated one", size="sm")
                note = gr.Markdown()

            def show(chosen: Picture) -> tuple[Any, ...]:
                return chosen, enlarge(chosen.pixels), chosen.note

            def taken(pictures: list[Picture], index: int | None, place: int = place) -> tuple[Any, ...]:
                return show(_taken(pictures, index, place))

            outputs = [picture, shown, note]
            _on(upload.upload, lambda path: show(handlers.read(path)), [upload], outputs)
            _on(take.click, taken, [generated, selected], outputs)
            ends.append(picture)
    num_images = gr.Slider(2, 16, 9, step=1, label="Number of pictures, both ends included")
    button, gallery = (
        gr.Button("Interpolate", variant="primary"),
        _gallery("From the first to the second", 9, height=330),
    )

    def interpolate(first: Picture | None, second: Picture | None, count: int) -> list[Any]:
        return [to_pil(pixels) for pixels in handlers.interpolate(first, second, count)]

    _on(button.click, interpolate, [*ends, num_images], [gallery])


# --- what the tabs are made of --------------------------------------------------------------------------------------


def _on(trigger: Event, handler: Event, inputs: list[Component], outputs: list[Component]) -> None:
    """Lets an event call a handler: one at a time over the whole page, what a person got wrong said as a sentence."""

    @functools.wraps(handler)
    def said(*given: Any) -> Any:
        try:
            return handler(*given)
        except InputError as error:
            sentence = html.escape(str(error))  # Gradio takes it for HTML
            raise gr.Error(sentence, duration=None, print_exception=False) from None

    trigger(said, inputs, outputs, concurrency_id="model", concurrency_limit=1, api_visibility="private")


def _sampling_controls(pipeline: TwoStagePipeline) -> dict[str, Component]:
    """The settings that this model can be sampled with, by field of `SamplingConfig`."""
    with gr.Accordion("Sampling", open=False):
        controls: dict[str, Component] = {"temperature": _setting("temperature", 0.1, 2, 1, 0.05)}
        if pipeline.prior is None:
            return controls
        config = pipeline.prior.config
        if config.class_names and config.loss.class_dropout_prob:
            controls["guidance_scale"] = _setting("guidance_scale", 0, 8, 2, 0.25)
        controls["top_k"] = _setting("top_k", 1, config.codebook_size, config.codebook_size, 1)
        controls["top_p"] = _setting("top_p", 0.05, 1, 1, 0.05)
        if "num_steps" in config.model.sampling_settings:
            cells = config.grid[0] * config.grid[1]
            controls["num_steps"] = _setting("num_steps", 1, min(64, cells), min(8, cells), 1)
    return controls


def _setting(name: str, low: float, high: float, value: float, step: float) -> gr.Slider:
    """A slider with the title and the description of a field of `SamplingConfig`."""
    field = SamplingConfig.model_fields[name]
    label = field.title or name.replace("_", " ").capitalize()
    return gr.Slider(low, high, value, step=step, label=label, info=field.description)


def _named(controls: dict[str, Component], values: list[Any]) -> dict[str, Any]:
    return dict(zip(controls, values, strict=True))


def _seed_box() -> gr.Number:
    return gr.Number(0, label="Seed", info="The same seed gives the same images.", precision=0)


def _upload_button(label: str) -> gr.UploadButton:
    return gr.UploadButton(label, file_types=PICTURE_FILES, type="filepath", size="sm")


def _picture(label: str, visible: bool = True, height: int = 420) -> gr.Image:
    """Shows a picture; takes none."""
    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        sources=[],
        buttons=["download"],
        height=height,
        visible=visible,
        elem_classes="shown",
    )


def _gallery(label: str, columns: int, height: int) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        format="png",
        columns=columns,
        height=height,
        object_fit="contain",
        interactive=False,
        buttons=["download"],
        elem_classes="pixels",
    )


def _taken(pictures: list[Picture], index: int | None, place: int) -> Picture:
    """The generated picture that is selected, or the one at ``place``."""
    if not pictures:
        raise InputError("there is no generated picture yet: make some on the page Generate")
    return pictures[min(place if index is None else index, len(pictures) - 1)]


def _shown(progress: gr.Progress) -> Callable[[float], object]:
    return lambda share: progress(share, desc="Drawing")
