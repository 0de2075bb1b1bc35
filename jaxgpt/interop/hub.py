"""Models of the Hugging Face hub, by huggingface_hub (the extra `hub`).

Only configs, tokenizers and safetensors are downloaded: nothing that could be executed.
"""

from jaxgpt.optional import require
from jaxgpt.settings import ConfigError

PATTERNS = (
    "*.json", "*.safetensors", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt",
    "vocab.bpe", "*.jinja",
)  # fmt: skip


def download(name: str) -> str:
    """Return the folder of a model of the hub, which is downloaded unless it is in the cache.

    Args:
        name: "user/name".

    Raises:
        ConfigError: there is no such model, or no network; the message says how to go on.
    """
    hub = require("huggingface_hub", f"the model {name!r} of the Hugging Face hub")
    try:
        return hub.snapshot_download(name, allow_patterns=list(PATTERNS))
    except Exception as error:  # of the network, of the hub, of permissions: any class
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{name!r} is no file or folder here, and it cannot be downloaded from the Hugging "
            f"Face hub ({type(error).__name__}: {reason[0][:200] if reason else ''}). On a machine "
            f"with a network, `hf download {name} --local-dir {name.rpartition('/')[2]}` fetches "
            "it; then load that folder."
        ) from error
