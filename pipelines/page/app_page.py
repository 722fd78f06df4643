"""The page itself, in Gradio: its layout, and which button calls which handler.

Uploads arrive as files, and only `Handlers.read` reads them: Gradio's own image components would decode them first, so
here they only show images.
"""

import functools
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.themes
from gradio.components import Component
from PIL import Image

from pipelines.drawing.two_stage import TwoStagePipeline
from pipelines.page.app_handlers import ALL_CLASSES, NO_CLASS, Handlers, PageImage, draw_all_codes, enlarge
from pipelines.page.painted_maps import MapCanvas, hex_colour
from stage1_tokenizer.autoencoder import Autoencoder
from stage2_prior.sampling_config import SamplingConfig
from twostage.core.errors import InputError
from twostage.core.images.conversion import to_pil
from twostage.core.scales import describe_grids

__all__ = ["CSS", "THEME", "build_page"]

MAX_IMAGES = 100
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"]
THEME = gradio.themes.Default(
    primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
"""System fonts only: Gradio may fetch its other fonts from elsewhere."""
CSS = """
.pixels img { image-rendering: pixelated; object-fit: contain !important; }
.pixels .grid-wrap { margin-top: 26px; }
.pixels .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); grid-auto-rows: auto; }
.pixels .thumbnail-lg { aspect-ratio: auto; height: auto; }
.pixels .thumbnail-lg img { height: auto; }
.pixels .caption-label { position: static; display: block; max-width: none; margin: 0; padding: 2px 3px; border: 0;
  font-size: 11px; line-height: 1.3; text-align: center; white-space: normal; overflow-wrap: anywhere; }
.labels .wrap { max-height: 180px; overflow-y: auto; }
.labels .wrap label span { color: #1e293b; }
.shown img { box-sizing: border-box; padding-top: 28px; object-fit: contain !important; }
@media (max-width: 700px) {
  .pixels .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
"""
"""Galleries show small images with square pixels, whole captions and all columns, or three on a telephone; no label
covers an image."""
BRUSH = "#e11d48"
GUIDANCE = "Above 1: closer to the class or prompt. 0: ignores it."
PROGRESS = gr.Progress()
"""A default argument that makes Gradio show a progress bar on the page."""

Event = Callable[..., Any]


def build_page(pipeline: TwoStagePipeline, name: str) -> gr.Blocks:
    """The page for a pipeline, with its ``name`` and only the tabs and controls that apply to it."""
    handlers = Handlers(pipeline)
    with gr.Blocks(title=f"{name} - twostage", analytics_enabled=False) as page:
        gr.Markdown(f"# {name}\n{describe(pipeline)}")
        generated, selected = gr.State([]), gr.State(None)
        with gr.Tab("Generate"):
            _generate_tab(handlers, generated, selected)
        takes_uploads = not pipeline.tokenizer.conditions  # an uploaded image has no class or caption
        if takes_uploads:
            with gr.Tab("Reconstruct"):
                _reconstruct_tab(handlers, generated, selected)
        if pipeline.prior:
            with gr.Tab("Inpaint"):
                _inpaint_tab(handlers, generated, selected)
        if takes_uploads:
            with gr.Tab("Interpolate"):
                _interpolate_tab(handlers, generated, selected)
    # One model does one thing at a time.
    page.queue(default_concurrency_limit=1)
    return page


def describe(pipeline: TwoStagePipeline) -> str:
    """One line of facts about the model."""
    tokenizer, names, (height, width) = pipeline.tokenizer, pipeline.class_names, pipeline.image_size
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[pipeline.channels]
    if pipeline.prior:
        model = pipeline.prior.config.model.type.replace("_", " ")
        about = f"{model} over {_grids(tokenizer)} codes from {tokenizer.codebook_size}"
    else:
        about = f"variational autoencoder with a latent of {' x '.join(map(str, tokenizer.latent_shape))}"
    classes = f"{len(names)} classes" if names else "no classes"
    return " · ".join([about, f"{height} x {width} {kind} images", classes])


def _grids(tokenizer: Autoencoder) -> str:
    return describe_grids(tokenizer.code_grid, tokenizer.bottleneck.scales).replace("x", " x ")


# --- the tabs -------------------------------------------------------------------------------------------------------


def _generate_tab(handlers: Handlers, generated: gr.State, selected: gr.State) -> None:
    pipeline = handlers.pipeline
    names = pipeline.class_names
    columns, canvas = len(names) if names and 4 <= len(names) <= 12 else 8, handlers.canvas
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            # A custom value gets our own message, which suggests the nearest name.
            class_name = gr.Dropdown(
                [ALL_CLASSES, *(names or [])], label="Class", allow_custom_value=True, visible=bool(names)
            )
            prompt = _prompt_box(handlers, "Empty: example prompts.")
            negative_prompt = gr.Textbox(
                label="Negative prompt",
                info="What guidance leads away from.",
                visible=handlers.reads("text") and pipeline.prior is not None,
            )
            uploaded, editor = _map_editor(canvas) if canvas else (gr.State(), gr.State())
            num_images = gr.Slider(1, MAX_IMAGES, 2 * columns, step=1, label="Number of images")
            seed, controls = _seed_box(), _sampling_controls(handlers.pipeline)
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2):
            if isinstance(editor, gr.ImageEditor):
                editor.render()
            gallery = _gallery("Generated", columns, height=480)

    def generate(progress: gr.Progress = PROGRESS, *given: Any) -> tuple[list[Any], list[PageImage], None]:
        count, name, text, against, number, below, edited, *sampling = given
        texts = _given(text), _given(against)
        settings = dict(zip(controls, sampling, strict=True))
        given_map = canvas.painted(below, edited["background"], edited["layers"]) if canvas and edited else None
        images = handlers.generate(count, name, number, settings, _shown(progress), *texts, given_map)
        return (
            [(to_pil(handlers.pipeline.to_shown(image.pixels)), image.prompt or image.class_name) for image in images],
            images,
            None,
        )

    inputs = [num_images, class_name, prompt, negative_prompt, seed, uploaded, editor, *controls.values()]
    _on(button.click, generate, inputs, [gallery, generated, selected])

    def select(event: gr.SelectData) -> int:
        return event.index

    gallery.select(select, None, selected, api_visibility="private")


def _map_editor(canvas: MapCanvas) -> tuple[gr.State, gr.ImageEditor]:
    """The controls of a map: the uploaded one, or None, and what it is painted on, to be rendered elsewhere."""
    labels, empty, uploaded = canvas.labels, enlarge(canvas.draw(canvas.empty())), gr.State()
    brush = _brush(hex_colour(labels[-1])) if labels else gr.Brush(default_size=6, default_color="#000000")
    editor = _editor("Paint a map", brush, empty)
    upload, note = _upload_button("Upload a map"), gr.Markdown()

    def show(path: str) -> tuple[Any, ...]:
        found = canvas.read(path)
        said = f"Loaded {Path(path).name}. Clear the canvas to remove it."
        return found, _ground(enlarge(canvas.draw(found))), said

    _on(upload.upload, show, [upload], [uploaded, editor, note])
    if labels:
        _label_choice(canvas, editor)
    return uploaded, editor


def _label_choice(canvas: MapCanvas, editor: gr.ImageEditor) -> None:
    """Which label the brush paints."""
    labels = canvas.labels
    info = f"The rest keeps the uploaded label, or {canvas.names[0]}. Nothing painted or uploaded: no map."
    choices = list(zip(canvas.names, map(str, labels), strict=True))
    label = gr.Radio(choices, value=str(labels[-1]), label="Label to paint", info=info, elem_classes="labels")
    rules = [f".labels label:nth-of-type({i}) {{ background: {hex_colour(each)} }}" for i, each in enumerate(labels, 1)]
    gr.HTML(f"<style>{' '.join(rules)}</style>", visible="hidden")
    _on(label.change, lambda chosen: gr.ImageEditor(brush=_brush(hex_colour(int(chosen)))), [label], [editor])


def _reconstruct_tab(handlers: Handlers, generated: gr.State, selected: gr.State) -> None:
    pipeline = handlers.pipeline
    upload, take = _source_buttons("Upload an image")
    note = gr.Markdown()
    with gr.Row():
        given, back = _image_box("Your image, as the model sees it"), _image_box("Its reconstruction")
        label = f"Its codes: {_grids(pipeline.tokenizer)} from {pipeline.tokenizer.codebook_size}"
        codes = _image_box(label, visible=bool(pipeline.prior))

    def reconstruct(image: PageImage) -> tuple[Any, ...]:
        pixels, indices, quality = handlers.reconstruct(image)
        drawn = None if indices is None else draw_all_codes(indices, pipeline.tokenizer)
        given, rebuilt = (enlarge(pipeline.to_shown(each)) for each in (image.pixels, pixels))
        return given, rebuilt, drawn, f"{image.note} {quality}"

    def taken(images: list[PageImage], index: int | None) -> tuple[Any, ...]:
        return reconstruct(_taken(handlers, images, index, 0))

    outputs = [given, back, codes, note]
    _on(upload.upload, lambda path: reconstruct(handlers.read(path)), [upload], outputs)
    _on(take.click, taken, [generated, selected], outputs)


def _inpaint_tab(handlers: Handlers, generated: gr.State, selected: gr.State) -> None:
    names, prior = handlers.pipeline.class_names or [], handlers.pipeline.prior
    assert prior
    choices = [NO_CLASS, *names] if prior.config.loss.class_dropout_prob or not names else names
    parts, first_part = handlers.parts_to_redraw()
    image = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            upload, take = _source_buttons("Upload an image")
            note = gr.Markdown()
            part = gr.Dropdown(parts, value=first_part, label="Redraw")
            class_name = gr.Dropdown(choices, label="Class", allow_custom_value=True, visible=bool(names))
            prompt = _prompt_box(handlers, "Empty: without a prompt.")
            num_images = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Number of completions")
            feather = gr.Slider(0, 8, 0, step=1, label="Feather in pixels", info="How far kept pixels blend in.")
            seed, controls = _seed_box(), _sampling_controls(handlers.pipeline)
            button = gr.Button("Inpaint", variant="primary")
        with gr.Column(scale=2):
            editor, gallery = (
                _editor("Brush over what is to be redrawn", _brush(BRUSH)),
                _gallery("Completions", 8, height=260),
            )

    def show(chosen: PageImage) -> tuple[Any, ...]:
        return (
            chosen,
            _ground(enlarge(handlers.pipeline.to_shown(chosen.pixels))),
            chosen.note,
            chosen.class_name or (NO_CLASS if NO_CLASS in choices else names[0]),
        )

    outputs = [image, editor, note, class_name]
    _on(upload.upload, lambda path: show(handlers.read(path)), [upload], outputs)
    _on(take.click, lambda images, index: show(_taken(handlers, images, index, 0)), [generated, selected], outputs)

    def inpaint(progress: gr.Progress = PROGRESS, *given: Any) -> list[Any]:
        chosen, edited, which, count, name, text, number, width, *sampling = given
        layers = edited["layers"] if edited else []
        settings = dict(zip(controls, sampling, strict=True))
        asked = chosen, layers, which, count, name, number, width, settings
        images = handlers.inpaint(*asked, _shown(progress), _given(text))
        return [to_pil(handlers.pipeline.to_shown(pixels)) for pixels in images]

    inputs = [image, editor, part, num_images, class_name, prompt, seed, feather, *controls.values()]
    _on(button.click, inpaint, inputs, [gallery])


def _interpolate_tab(handlers: Handlers, generated: gr.State, selected: gr.State) -> None:
    ends = []
    with gr.Row():
        for place, word in enumerate(("first", "second")):
            with gr.Column():
                image, shown = gr.State(), _image_box(f"The {word}", height=300)
                upload, take = _source_buttons(f"Upload the {word}")
                note = gr.Markdown()

            def show(chosen: PageImage) -> tuple[Any, ...]:
                return chosen, enlarge(handlers.pipeline.to_shown(chosen.pixels)), chosen.note

            def taken(images: list[PageImage], index: int | None, place: int = place) -> tuple[Any, ...]:
                return show(_taken(handlers, images, index, place))

            outputs = [image, shown, note]
            _on(upload.upload, lambda path: show(handlers.read(path)), [upload], outputs)
            _on(take.click, taken, [generated, selected], outputs)
            ends.append(image)
    num_images = gr.Slider(2, 16, 9, step=1, label="Number of images, including both ends")
    button = gr.Button("Interpolate", variant="primary")
    gallery = _gallery("From the first to the second", 9, height=330)

    def interpolate(first: PageImage | None, second: PageImage | None, count: int) -> list[Any]:
        return [to_pil(handlers.pipeline.to_shown(pixels)) for pixels in handlers.interpolate(first, second, count)]

    _on(button.click, interpolate, [*ends, num_images], [gallery])


# --- the parts of the tabs ------------------------------------------------------------------------------------------


def _on(trigger: Event, handler: Event, inputs: list[Component], outputs: list[Component]) -> None:
    """Calls a handler on an event: one at a time over the whole page. Bad input shows a message and changes nothing."""

    @functools.wraps(handler)
    def with_message(*given: Any) -> Any:
        try:
            return handler(*given)
        except InputError as error:
            gr.Warning(html.escape(str(error)), duration=None)  # Gradio takes it for HTML
            return [gr.skip() for _ in outputs] if len(outputs) > 1 else gr.skip()

    trigger(with_message, inputs, outputs, concurrency_id="model", concurrency_limit=1, api_visibility="private")


def _sampling_controls(pipeline: TwoStagePipeline) -> dict[str, Component]:
    """The settings that apply to this model, by field of `SamplingConfig`, with the defaults of `twostage generate`."""
    ranges: dict[str, tuple[float, float, float, float]] = {"temperature": (0.1, 2, 1, 0.05)}  # lowest to highest, step
    if pipeline.prior:
        config = pipeline.prior.config
        if config.conditions and all(map(pipeline.prior.dropout_of, config.conditions)):
            ranges["guidance_scale"] = (0, 8, 1, 0.25)
        if config.model.ranks_codes:
            ranges["top_k"] = (1, config.codebook_size, config.codebook_size, 1)
        ranges["top_p"] = (0.05, 1, 1, 0.05)
        if "num_steps" in config.model.sampling_settings:
            cells = config.grid[0] * config.grid[1]
            ranges["num_steps"] = (1, min(64, cells), min(64, config.model.default_steps(config.grid)), 1)
    fields = SamplingConfig.model_fields

    def slider(name: str) -> Component:
        low, high, value, step = ranges[name]
        label = fields[name].title or name.replace("_", " ").capitalize()
        info = GUIDANCE if name == "guidance_scale" else fields[name].description
        return gr.Slider(low, high, value, step=step, label=label, info=info)

    shown = {name: slider(name) for name in ranges if name == "guidance_scale"}
    with gr.Accordion("Sampling", open=False):
        return shown | {name: slider(name) for name in ranges if name != "guidance_scale"}


def _prompt_box(handlers: Handlers, info: str) -> gr.Textbox:
    """What to draw, for a model that is conditioned on captions."""
    examples = handlers.pipeline.model.example_prompts()
    hint = f"Such as: {examples[0]}" if examples else None
    return gr.Textbox(label="Prompt", placeholder=hint, info=info, visible=handlers.reads("text"))


def _given(text: str | None) -> str | None:
    """What was written into a box, if anything."""
    return (text or "").strip() or None


def _seed_box() -> gr.Number:
    return gr.Number(0, label="Seed", info="The same seed gives the same images.", precision=0)


def _source_buttons(label: str) -> tuple[gr.UploadButton, gr.Button]:
    with gr.Row():
        return _upload_button(label), gr.Button("Use a generated image", size="sm")


def _upload_button(label: str) -> gr.UploadButton:
    return gr.UploadButton(label, file_types=FILE_TYPES, type="filepath", size="sm")


def _image_box(label: str, visible: bool = True, height: int = 420) -> gr.Image:
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


def _editor(label: str, brush: gr.Brush, value: Image.Image | None = None) -> gr.ImageEditor:
    return gr.ImageEditor(
        _ground(value) if value else None,  # type: ignore[arg-type]
        label=label,
        type="numpy",
        format="png",
        sources=[],
        transforms=[],
        layers=False,
        brush=brush,
        eraser=gr.Eraser(default_size=28),
        buttons=[],
        height=480,
        canvas_size=value.size if value else (800, 800),
        render=value is None,
    )


def _ground(image: Image.Image) -> dict[str, Any]:
    """An editor's value before anything is painted."""
    return {"background": image, "layers": [], "composite": image}


def _brush(colour: str) -> gr.Brush:
    return gr.Brush(default_size=28, colors=[colour], color_mode="fixed")


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


def _taken(handlers: Handlers, images: list[PageImage], index: int | None, place: int) -> PageImage:
    """The generated image that is selected, or the one at ``place``; if there are none yet, one is generated."""
    if not images:
        return handlers.generate(place + 1, None, 0, {}, lambda _: None)[place]
    return images[min(place if index is None else index, len(images) - 1)]


def _shown(progress: gr.Progress) -> Callable[[float], object]:
    return lambda share: progress(share, desc="Drawing")
