"""Token mixers: attention and its alternatives, with one interface; see `Mixer`."""

from jaxgpt.model.mixers.attention import Attention
from jaxgpt.model.mixers.linformer import CausalLinformer, Linformer
from jaxgpt.model.mixers.mamba import Mamba
from jaxgpt.model.mixers.mixer import Mixer
from jaxgpt.model.mixers.performer import Performer
from jaxgpt.model.mixers.recurrent import GRU, LSTM
from jaxgpt.model.mixers.reformer import Reformer
from jaxgpt.model.mixers.s4 import S4
from jaxgpt.model.mixers.synthesizer import DenseSynthesizer, RandomSynthesizer
from jaxgpt.model.mixers.transformer_xl import TransformerXL

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "performer": Performer,
    "linformer": Linformer,
    "linformer_causal": CausalLinformer,
    "synthesizer_dense": DenseSynthesizer,
    "synthesizer_random": RandomSynthesizer,
    "reformer": Reformer,
    "transformer_xl": TransformerXL,
    "lstm": LSTM,
    "gru": GRU,
    "s4": S4,
    "mamba": Mamba,
}
