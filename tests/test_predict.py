"""Predictions of encoders with known answers."""

import jax.numpy as jnp
import numpy as np
from helpers import forward, random_params, single_document_coords, tiny

from jaxgpt.config import Config, TrainConfig
from jaxgpt.predict import fill
from jaxgpt.tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()


def test_masks_are_filled_with_the_probabilities_of_text_and_never_with_the_end_token():
    cfg = tiny(family="encoder", vocab=264, tie=False)
    params, mask = random_params(cfg), cfg.vocab - 1
    text = [*TOKENIZER.encode("the c"), mask, *TOKENIZER.encode("t"), mask]
    tokens = jnp.array([[TOKENIZER.bos, *text, TOKENIZER.eos]], jnp.int32)
    hidden = np.float64(forward(cfg, params, tokens, single_document_coords(tokens))[0][0])
    at_masks = hidden[np.flatnonzero(tokens[0] == mask)]  # [2 D]
    # Special tokens, and ids that no token has, are far likelier than any text.
    table = params["head"]["table"]
    special = np.r_[0:4, 260:264]
    table = table.at[special].set(100 * at_masks.mean(0))
    params = params | {"head": {"table": table}}
    scores = at_masks @ np.float64(table).T
    assert np.isin(scores.argmax(-1), special).all()
    p = np.exp(scores[:, 4:260])
    p /= p.sum(-1, keepdims=True)

    config = Config(model=cfg, train=TrainConfig(objective="masked"))
    (found,) = fill(config, params, TOKENIZER, ["the c<mask>t<mask>"], 3)
    assert len(found) == 2
    for mask, p_mask in zip(found, p, strict=True):
        best = np.argsort(-p_mask)[:3]
        assert [c.token for c in mask.candidates] == (best + 4).tolist()
        assert [c.text for c in mask.candidates] == [TOKENIZER.decode([i]) for i in best + 4]
        np.testing.assert_allclose(
            [c.probability for c in mask.candidates], p_mask[best], rtol=1e-4
        )
