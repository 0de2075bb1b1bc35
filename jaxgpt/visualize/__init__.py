"""Pictures of the inside of a model: figures, and one offline HTML page.

from jaxgpt import inspect, visualize

visualize.look(model, "The cat sat on the mat").save("page.html")
visualize.draw_lens(inspect.logit_lens(model, "The cat sat")).savefig("lens.png")
"""

from jaxgpt.visualize.figures import (
    draw_attention,
    draw_attribution,
    draw_context,
    draw_curves,
    draw_heads,
    draw_lens,
    draw_losses,
    draw_map,
    draw_positions,
    draw_sizes,
)
from jaxgpt.visualize.page import MAX_TOKENS, Page, describe_model, look

__all__ = [
    "MAX_TOKENS",
    "Page",
    "describe_model",
    "draw_attention",
    "draw_attribution",
    "draw_context",
    "draw_curves",
    "draw_heads",
    "draw_lens",
    "draw_losses",
    "draw_map",
    "draw_positions",
    "draw_sizes",
    "look",
]
