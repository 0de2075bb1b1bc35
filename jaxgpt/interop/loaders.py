"""The loaders of foreign models, as rows of `loading.LOADERS` name them."""

from collections.abc import Callable

import jax

from jaxgpt.interop import convert, hub, huggingface
from jaxgpt.interop.archive import Archive
from jaxgpt.language_model import LanguageModel
from jaxgpt.settings import ConfigError


def _make_loader(open_archive: Callable[[str], Archive]) -> Callable[..., LanguageModel]:
    """Return the loader of one format; see `jaxgpt.load` for its arguments."""

    def load(
        path: str,
        *,
        dtype: str | None,
        mesh: jax.sharding.Mesh | None,
        checkpoint: str,
        plugins: object,
    ) -> LanguageModel:
        try:
            return convert.to_model(open_archive(path), dtype=dtype, mesh=mesh)
        except MemoryError as error:
            raise ConfigError(f"there is not enough memory for the model {path}.") from error

    return load


load_folder = _make_loader(huggingface.open_folder)
load_hub = _make_loader(lambda name: huggingface.open_folder(hub.download(name)))
