"""Look inside a model: pure functions from a model and a text to arrays.

    from jaxgpt import inspect

    found = inspect.capture(model, "The cat sat", ["layers.*.residual_post"])
    weights = inspect.attention(model, "The cat sat")        # [L H T S]
    lens = inspect.logit_lens(model, "The cat sat")
    inspect.patch(model, "The cat sat", {"layers.1.ffn.out": "zero"}).logits

They take any `LanguageModel`, trained or imported, of any family and mixer.
`jaxgpt.visualize` draws what they return.
"""

from jaxgpt.inspect.activations import (
    Activations,
    EncodedText,
    capture,
    encode,
    patch,
    spell_tokens,
)
from jaxgpt.inspect.attention import (
    ablate_heads,
    attention,
    find_attention_layers,
    flow,
    induction_loss,
    induction_scores,
    previous_token_scores,
    rollout,
)
from jaxgpt.inspect.attribution import (
    Attribution,
    LogitParts,
    attribute_logit,
    decompose_logits,
    gradient_by_position,
    gradient_x_input,
    integrated_gradients,
)
from jaxgpt.inspect.context import (
    LossByPosition,
    PositionBin,
    check_length,
    format_bins,
    loss_by_position,
    read_long_rows,
)
from jaxgpt.inspect.geometry import (
    analogy,
    anisotropy,
    cka,
    effective_rank,
    get_embeddings,
    neighbours,
    pca,
    similarity_matrix,
    tsne,
)
from jaxgpt.inspect.lens import Lens, NextToken, logit_lens, next_tokens, token_losses
from jaxgpt.inspect.patching import activation_patching
from jaxgpt.inspect.positions import (
    PositionPicture,
    describe_model_positions,
    describe_positions,
    rope_decay,
)
from jaxgpt.inspect.tokens import MergeStep, Token, merge_steps, tokenize

__all__ = [
    "Activations",
    "Attribution",
    "EncodedText",
    "Lens",
    "LogitParts",
    "LossByPosition",
    "MergeStep",
    "NextToken",
    "PositionBin",
    "PositionPicture",
    "Token",
    "ablate_heads",
    "activation_patching",
    "analogy",
    "anisotropy",
    "attention",
    "attribute_logit",
    "capture",
    "check_length",
    "cka",
    "decompose_logits",
    "describe_model_positions",
    "describe_positions",
    "effective_rank",
    "encode",
    "find_attention_layers",
    "flow",
    "format_bins",
    "get_embeddings",
    "gradient_by_position",
    "gradient_x_input",
    "induction_loss",
    "induction_scores",
    "integrated_gradients",
    "logit_lens",
    "loss_by_position",
    "merge_steps",
    "neighbours",
    "next_tokens",
    "patch",
    "pca",
    "previous_token_scores",
    "read_long_rows",
    "rollout",
    "rope_decay",
    "similarity_matrix",
    "spell_tokens",
    "token_losses",
    "tokenize",
    "tsne",
]
