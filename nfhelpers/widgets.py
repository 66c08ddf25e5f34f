"""Controls over a figure, and a line with a stop button over a training.

A notebook writes its draw function, calls it once as a plain function, which leaves a static figure and does
not hide an error, then hands it to `panel`."""

import functools
import html
import io
import threading
import traceback
from contextlib import contextmanager

import ipywidgets
from IPython.display import display

WIDE = {"style": {"description_width": "11em"}, "layout": {"width": "98%", "max_width": "760px"}}


def panel(draw, controls, *, button=None, cache=32, uses=None):
    """A column of controls above the figure that `draw` returns for their values; an ipywidgets.VBox.

    draw: function of the controls' values by name; returns a Figure, (Figure, text) or (Figure, text, HTML).
    controls: dict of name -> widget. button: its label; nothing is drawn until it is pressed. cache: drawings
    kept (0 if values are not hashable). uses: {control: (other, values)}: greyed out for other values.
    An error stands in the picture's place in red and is raised again. Sliders redraw on release.
    """
    # At its own size where there is room: a column would stretch it to its full width.
    size = {"max_width": "100%", "min_width": "220px", "align_self": "flex-start"}
    image, below = ipywidgets.Image(format="png", layout=size), ipywidgets.HTML()
    text = ipywidgets.HTML(layout={"min_height": "2em"})

    def render(*values):
        drawn = draw(**dict(zip(controls, values, strict=True)))
        figure, caption, markup = (*(drawn if isinstance(drawn, tuple) else (drawn,)), "", "")[:3]
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi="figure")
        return png.getvalue(), f"<code>{html.escape(caption)}</code>" if caption else "", markup

    rendered = functools.lru_cache(cache)(render) if cache else render

    def arrived():
        uploads = [control for control in controls.values() if isinstance(control, ipywidgets.FileUpload)]
        files = (file for upload in uploads for file in upload.value)
        files = [f"{file['name']}, {len(file['content']):,} bytes" for file in files]
        said = f"last upload that arrived: {html.escape(', '.join(files) or 'none')}"
        return f"<code>{said}</code><br>" if uploads else ""

    def redraw(change=None):
        text.value = '<code class="nf-busy" style="color:#555555">computing ...</code>'
        try:
            drawn = rendered(*(control.value for control in controls.values()))
            image.value, text.value, below.value = drawn[0], arrived() + drawn[1], drawn[2]
        except (Exception, KeyboardInterrupt) as error:
            image.layout.display = below.layout.display = "none"  # they would belong to other settings
            message = html.escape("".join(traceback.format_exception_only(error)))
            text.value = f'<pre class="nf-error" style="color:#b00020">{message}</pre>'
            raise
        image.layout.display = below.layout.display = None

    def invite(change):
        text.value = f"{arrived()}<code>settings changed: press {html.escape(button)}</code>"

    def grey_out(change=None):
        for name, (other, values) in (uses or {}).items():
            controls[name].disabled = controls[other].value not in values

    grey_out()
    redraw()
    for control in controls.values():
        control.observe(grey_out, names="value")
        if control.has_trait("continuous_update"):
            control.continuous_update = False
        control.observe(redraw if button is None else invite, names="value")
    press = ipywidgets.Button(description=button or "", layout={"width": "max-content"})
    press.on_click(redraw)
    return ipywidgets.VBox([*controls.values(), *([press] if button else []), text, image, below])


def slider(value, low, high, step, name):
    """A slider over whole numbers if `step` is one, else over floats."""
    kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
    return kind(value=value, min=low, max=high, step=step, description=name, **WIDE)


def steps(options, value, name):
    """A slider over these values only."""
    return ipywidgets.SelectionSlider(options=options, value=value, description=name, **WIDE)


def choice(options, value, name):
    """A list to choose from."""
    return ipywidgets.Dropdown(options=options, value=value, description=name, style=WIDE["style"])


@contextmanager
def training_monitor(epochs):
    """A line on how far a training is, and a button that stops it after the current epoch:

        with widgets.training_monitor(config.epochs) as callback:
            result = train.fit(model, data, config, callback=callback)

    Running the cell again goes on. The button needs the subshells of JupyterLab 4.4 and ipykernel 7."""
    pressed = threading.Event()
    button = ipywidgets.Button(description="stop training", icon="stop")
    line = ipywidgets.HTML("<code>before the first epoch</code>")

    def callback(epoch, history, fields):
        line.value = f"<code>epoch {epoch} of {epochs}, loss {history['loss'][-1]:.3f}</code>"
        if pressed.is_set():
            raise KeyboardInterrupt  # which `train.fit` takes as a wish to stop, and saves

    def stop(*_):
        pressed.set()
        button.disabled, button.description = True, "stopping ..."

    button.on_click(stop)
    display(ipywidgets.HBox([button, line]))
    # ipykernel 7.4 answers a widget on the shell that spoke to it last, which is busy training; without this
    # note the answer goes where JupyterLab asked for it, to the subshell of widgets.
    vars(button.comm).pop("_reply_subshell_id", None)
    try:
        yield callback
    finally:
        button.disabled, button.description = True, "ended"
