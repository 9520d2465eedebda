"""Each method's knobs against error and time on real q, k and v, drawn for its page: ``make knobs``.

The data: one text of Python's own help, 2048 tokens of it, in all-MiniLM-L6-v2, whose 512 learned positions are
interpolated to as many; q, k and v of its second and fifth layer, side by side as a batch of two. The model was not
trained for such positions, but these are a trained model's queries and keys, on a text that is long enough for the
methods to pay off. LSH attention, whose queries are its keys, has the model's queries as both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.cli._minilm import load
from fastattn.integrations.calibrate import calibrate
from fastattn.integrations.calibrate_capture import capture
from fastattn.integrations.calibrate_plot import draw
from fastattn.integrations.calibrate_result import Calibration

LENGTH = 2048
LAYERS = (1, 4)
DRAWS = 2
SECONDS = 15.0  # of timing a method's settings, in turns
PLOTS = Path(__file__).parent.parent / "docs" / "plots"
METHODS = {  # by page: the method, and what its attention is where that is no softmax of q, k and v
    "smyrf": ("smyrf", "dense attention"),
    "reformer": ("lsh", "dense shared-QK attention"),
    "clustered": ("clustered", "dense attention"),
    "improved-clustered": ("improved_clustered", "dense attention"),
    "linear": ("linear", "dense attention, features: favor"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.knobs", description="Knobs against error and time.")
    parser.add_argument("pages", nargs="*", metavar="page", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens (default: {LENGTH})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of timing a method (default: {SECONDS:g})")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="folder of the drawings")
    chosen = parser.parse_args(arguments)
    if unknown := [page for page in chosen.pages if page not in METHODS]:
        parser.error(f"no page {', '.join(unknown)}; there are {', '.join(METHODS)}")
    chosen.plots.mkdir(parents=True, exist_ok=True)
    q, k, v = inputs(chosen.length)
    for page in chosen.pages or METHODS:
        found = measure(page, q, k, v, chosen.seconds)
        print(found.table(), flush=True)
        path = draw(found, chosen.plots / f"{page}.svg", title=f"error against {METHODS[page][1]}", with_budget=False)
        print(f"written to {path}\n", flush=True)


def measure(page: str, q: Tensor, k: Tensor, v: Tensor, seconds: float) -> Calibration:
    method = METHODS[page][0]
    options: dict[str, Any] = {"max_error": 1.0, "draws": DRAWS, "seconds": seconds, "longest": 0}
    if method == "lsh":  # keys of unit length, with the scale of trax's and Hugging Face's models
        return calibrate((q, q, v), method, scale=1.0, **options)
    return calibrate((q, k, v), method, **options)


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (2, 12, length, 32), of MiniLM's layers :data:`LAYERS` on one text."""
    model, tokenizer = load()
    table = model.embeddings.position_embeddings.weight.detach()  # [512, width]
    stretched = nn.functional.interpolate(table.T[None], size=length, mode="linear", align_corners=True)[0].T
    model.embeddings.position_embeddings = nn.Embedding.from_pretrained(stretched.contiguous())
    ids = tokenizer(_text(), truncation=True, max_length=length, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[1] < length:
        raise ValueError(f"length must be at most the text's {ids.shape[1]} tokens, got {length}")
    places = torch.arange(length)[None]
    batch = {"input_ids": ids, "position_ids": places, "token_type_ids": torch.zeros_like(places)}
    samples, _ = capture(model, batch, LAYERS)
    parts = [samples[layer][0] for layer in LAYERS]
    q, k, v = (torch.cat([getattr(part, name) for part in parts]) for name in "qkv")
    return q, k, v


def _text() -> str:
    from pydoc_data.topics import topics

    return topics["specialnames"]  # the longest: how classes take part in the language


if __name__ == "__main__":
    main()
