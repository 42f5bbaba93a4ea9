"""A page in the browser: upload an infrared crop, see the visible gallery ranked, with scores.

    pip install 'deen-zoo[demo]'
    python examples/demo.py                      # then open http://127.0.0.1:7860
    python examples/demo.py --gallery crops/cam1 crops/cam2 --queries crops/night

Without a gallery, synthetic people are drawn first. The page is served to this machine alone and
answers to the names localhost and 127.0.0.1; nothing is fetched from elsewhere or sent there.
Uploads are read as images, whatever else they may be, and are deleted when the demo ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

from deen_zoo import FeatureExtractor
from deen_zoo.data import open_image
from deen_zoo.data.folder import list_images
from deen_zoo.errors import require
from deen_zoo.synthetic import synthesize

gr: Any = require("gradio", "demo")

WORLD = 2  # the shipped tiny model was trained on people of world 0
MODALITIES = ("infrared", "visible")
HOSTS = ("127.0.0.1", "localhost")  # other names in a request come from other sites' pages
ABOUT = """# Who is this?
Upload an infrared crop of a person: the pictures of colour cameras are ranked by how alike the two
descriptors are. The score is their cosine similarity: 1 is the same picture, and no score proves
who somebody is.

**Model:** {model}. {knows}"""
UNKNOWN = "Nothing in its folder says what its weights were trained on."
DRAWN = """
> ⚠️ **These weights know drawn people only.** They show how things work; on photographs of real
> people their scores mean nothing. Start the demo with `--model` and weights of real people."""
CSS = """
#query img { width: 100%; height: 100%; object-fit: contain; }
#ranking { --radius-lg: 6px; border: 0; background: none; }
#ranking .grid-wrap { max-height: none; overflow: visible; padding: 0; }
#ranking .grid-container { gap: 10px; grid-template-columns: repeat(6, minmax(0, 1fr)); }
#ranking .thumbnail-item { aspect-ratio: 3 / 8; border: 0; }
#ranking .thumbnail-item img { object-fit: fill; }
#ranking .caption-label {
  inset: auto 0 0 0; max-width: none; padding: 3px; border: 0; border-radius: 0; box-shadow: none;
  background: rgb(15 23 42 / 82%); color: white; font-size: 12px; text-align: center;
  white-space: pre-line; font-variant-numeric: tabular-nums;
}
#ranking .caption-label::first-line { font-size: 15px; font-weight: 600; }
footer { display: none !important; }
"""


def about(model: Any) -> str:
    """The head of the page: which model it is and what its weights know."""
    name = model.pretrained_cfg.get("architecture", type(model).__name__)
    trained = getattr(model, "trained_on", None) or {}
    # A tiny model of the name alone is the shipped one.
    drawn = trained.get("drawn", not trained and name.startswith("test_"))
    knows = f"Trained on {trained['dataset']}." if "dataset" in trained else UNKNOWN
    knows = "" if drawn else knows
    return ABOUT.format(model=name, knows=knows) + (DRAWN if drawn else "")


def readable(paths: Sequence[str]) -> Iterator[str]:
    """Those that are images by their content."""
    for path in paths:
        try:
            open_image(path)
        except (OSError, ValueError):
            continue
        yield path


class Searcher:
    """Descriptors of a gallery, and its ranking for one query."""

    def __init__(self, extractor: FeatureExtractor, folders: Sequence[str]) -> None:
        self.extractor = extractor
        self.gallery = extractor.table(folders, modality="visible")
        for reason in self.gallery.unreadable.values():
            print(f"left out: {reason}")
        if not len(self.gallery):
            raise SystemExit(f"no image can be read in {', '.join(folders)}")
        self.root = os.path.commonpath([os.path.dirname(path) for path in self.gallery.paths])

    def __call__(self, query: str | None, modality: str, k: int) -> list[tuple[Any, str]]:
        """The k nearest as (image, caption), the best first."""
        if query is None:
            return []
        try:
            image = open_image(query, self.extractor.intensity)
        except (OSError, ValueError):
            raise gr.Error("This image cannot be read.", print_exception=False) from None
        scores = self.gallery.features.float() @ self.extractor([image], modality=modality)[0]
        best = scores.argsort(descending=True, stable=True)[:k].tolist()
        return [(self.picture(i), f"{scores[i]:.3f}\n{self.place(i)}") for i in best]

    def picture(self, row: int) -> Any:
        """The picture itself: no path of the gallery is ever served."""
        return open_image(self.gallery.paths[row], self.gallery.intensity)

    def place(self, row: int) -> str:
        """A short name: the folders that an image lies in, or its own name without any."""
        relative = Path(self.gallery.paths[row]).relative_to(self.root)
        return str(relative.parent if relative.parent.parts else relative)


def build(searcher: Searcher, queries: Sequence[str], k: int) -> Any:
    """The page."""
    with gr.Blocks(analytics_enabled=False, title="deen_zoo") as page:
        gr.Markdown(about(searcher.extractor.model))
        with gr.Row():
            with gr.Column(scale=1, min_width=250):
                query = gr.Image(
                    label="Query", elem_id="query", height=300, sources=["upload"],
                    type="filepath", image_mode=None,  # the very file: by default it is made a WebP
                )  # fmt: skip
                modality = gr.Radio(MODALITIES, value=MODALITIES[0], label="It was taken in")
                count = gr.Slider(1, 24, k, step=1, label="How many")
            with gr.Column(scale=4):
                gr.Markdown(f"The most similar of **{len(searcher.gallery)}** visible images")
                ranking = gr.Gallery(
                    columns=6, height="auto", show_label=False, elem_id="ranking", buttons=[]
                )
        inputs = [query, modality, count]
        if queries:
            gr.Examples([[path] for path in queries], [query], label="Or one of these")
        for changed in inputs:
            changed.change(searcher, inputs, ranking, show_progress="minimal")
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Search a visible gallery from the browser.")
    parser.add_argument("--gallery", nargs="+", metavar="FOLDER", help="of visible crops")
    parser.add_argument("--queries", nargs="+", metavar="FOLDER", help="infrared crops to offer")
    parser.add_argument("--model", default="test_deen_resnet", help="a name, or local-dir:FOLDER")
    parser.add_argument("-k", type=int, default=12, help="how many to show (default: 12)")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["GRADIO_TEMP_DIR"] = f"{scratch}/uploads"  # nothing stays behind
        try:
            serve(args, scratch)
        except KeyboardInterrupt:
            print("interrupted")


def serve(args: argparse.Namespace, scratch: str) -> None:
    gallery, queries = args.gallery, args.queries or []
    if not gallery:
        print("drawing synthetic people ...", flush=True)
        synthesize("sysu", f"{scratch}/people", 20, seed=WORLD, images_per_camera=1)
        gallery = [f"{scratch}/people/cam{camera}" for camera in (1, 2, 4, 5)]
        queries = [f"{scratch}/people/cam{camera}" for camera in (3, 6)]
    searcher = Searcher(FeatureExtractor(args.model), gallery)
    found = [path for folder in queries for path in list_images(folder)[0]]
    offered = list(readable(found[:: -(-len(found) // 12) or 1]))
    trusted: Any = require("starlette.middleware.trustedhost", "demo").TrustedHostMiddleware
    guard = require("starlette.middleware", "demo").Middleware(trusted, allowed_hosts=list(HOSTS))
    build(searcher, offered, args.k).launch(
        server_name="127.0.0.1",
        server_port=args.port,
        share=False,
        ssr_mode=False,
        allowed_paths=offered,
        max_file_size="20mb",
        app_kwargs={"middleware": [guard]},
        css=CSS,
        # fonts of the reader's own machine: gradio's come from fonts.googleapis.com
        theme=gr.themes.Soft(
            primary_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
    )


if __name__ == "__main__":
    main()
