"""A page on which to drop an image and look: predictions, Grad-CAM and HAM's maps. `timm-ham demo`, or hub/space/."""

from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from timm_ham.errors import TimmHamError
from timm_ham.inspection.drawing import draw_attention, draw_gradcam
from timm_ham.inspection.gradcam import explain, short_names
from timm_ham.inspection.images import open_image
from timm_ham.inspection.predict import predict
from timm_ham.models.loading import load_classifier
from timm_ham.models.maps import ham_modules, inspect
from timm_ham.models.weights import hub_folders

try:
    import gradio as gr
except ImportError as error:
    raise TimmHamError(f"the demo needs Gradio ({error}): pip install 'timm_ham[demo]'") from error

__all__ = ['build_demo', 'launch_demo']

INTRODUCTION = """# What does the attention do?

Drop an image, choose models, and see what they take it for, where they look for it (Grad-CAM), and what the Hybrid
Attention Module weighs inside. Models of CIFAR-10 know airplanes, automobiles, birds, cats, deer, dogs, frogs, horses,
ships and trucks, and see 32x32 pixels; whatever else you show them, they take it for one of these."""
MAX_FILE_SIZE = '20mb'
classifier = cache(load_classifier)


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _look(choices: Dict[str, str], file: Optional[Dict[str, Any]], chosen: Sequence[str]) -> List[Any]:
    """The values of the components of the result: Grad-CAM, then bars and HAM's maps for each of the choices."""
    try:
        if file is None:
            raise TimmHamError('no image: drop one, or click an example')
        classifiers = {name: classifier(name) for name in choices if name in chosen}
        if not classifiers:
            raise TimmHamError('no model: choose one at least')
        image = open_image(Path(file['path']))
        found = {name: explain(loaded, image) for name, loaded in classifiers.items()}
    except TimmHamError as error:
        raise gr.Error(str(error), print_exception=False) from error
    strip = draw_gradcam([image], ['image'], [choices[name] for name in found], [list(found.values())])
    values = [gr.update(visible=True, value=_pixels(strip))]
    for name, title in choices.items():
        bars = maps = gr.update(visible=False, value=None)
        if name in found:
            bars = gr.update(visible=True, value=dict(predict(classifiers[name], image)))
            model = classifiers[name].model
            if ham_modules(model):
                attention = inspect(model, classifiers[name].transform(image)[None])
                maps = gr.update(visible=True, value=_pixels(draw_attention(found[name].seen, attention, title)))
        values += [bars, maps]
    return values


def build_demo(models: Sequence[str] = ()) -> gr.Blocks:
    """The page.

    Args:
        models: What can be chosen on it, as `load_classifier` takes them; the bundled weights if empty.

    Raises:
        TimmHamError: If one of the models can't be loaded.
    """
    choices = short_names(list(models) or [folder.name for folder in hub_folders()])
    for name in choices:
        classifier(name)
    roots = {folder.parent for folder in hub_folders()}
    examples = sorted(str(path) for root in roots for path in root.glob('space/examples/*'))
    shown = {
        'visible': False,
        'interactive': False,
        'show_label': False,
        'format': 'png',
        'buttons': ['download', 'fullscreen'],
    }
    with gr.Blocks(title='timm_ham: what the attention does', analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            image = gr.Image(sources=['upload', 'clipboard'], label='Image', height=300)
            with gr.Column():
                labelled = [(short, name) for name, short in choices.items()]
                chosen = gr.CheckboxGroup(labelled, value=list(choices)[:3], label='Models')
                look = gr.Button('Look', variant='primary')
                example = gr.Examples(examples, image, label='Examples')
        with gr.Row():
            bars = [gr.Label(label=short, num_top_classes=5, visible=False) for short in choices.values()]
        heat = gr.Image(label='Grad-CAM', alt_text='The image, and where each model looks for what it sees', **shown)
        maps = [
            gr.Image(label=f'HAM in {short}', alt_text='Spatial maps, channel attention, alpha and beta', **shown)
            for short in choices.values()
        ]
        # Without Gradio's preprocessing: it reports a file that is no image in a paragraph of Python.
        event = dict(
            fn=partial(_look, choices),
            inputs=[image, chosen],
            outputs=[heat, *chain(*zip(bars, maps))],
            preprocess=False,
        )
        gr.on([look.click, image.upload], **event, api_name='look')
        example.load_input_event.then(**event, api_visibility='private')
    return page


def launch_demo(models: Sequence[str] = (), port: Optional[int] = None, **options: Any) -> gr.Blocks:
    """Serve the page until it is interrupted, on 127.0.0.1 if the environment (a Space's) names no other address.

    Args:
        models: As for `build_demo`.
        port: TCP port; the first free one from 7860 on if None.
        **options: Further ones of gradio.Blocks.launch.

    Raises:
        TimmHamError: If a model can't be loaded, or the port is taken.
    """
    page = build_demo(models)
    try:
        page.launch(server_port=port, max_file_size=MAX_FILE_SIZE, show_error=True, ssr_mode=False, **options)
    except OSError as error:
        raise TimmHamError(f'port {port or "7860 to 7959"} is not free: choose another by --port') from error
    return page
