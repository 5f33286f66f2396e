"""Which engine a model and a job get."""

from __future__ import annotations

import pytest
from transformers import MambaConfig

from pipeline.continuous_engine import ContinuousEngine
from pipeline.engine import build_engine
from pipeline.errors import ModelError
from pipeline.model import Model
from pipeline.settings import EngineSettings
from pipeline.static_engine import StaticEngine
from tests.models import VOCABULARY_SIZE, load, make_model


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model with recurrent layers, which have no keys and values to keep in slots."""
    config = MambaConfig(vocab_size=VOCABULARY_SIZE, hidden_size=32, num_hidden_layers=2)
    return load(make_model(tmp_path_factory.mktemp("models") / "mamba", config))


def test_auto_is_continuous_where_the_cache_allows_it(llama: Model, mamba: Model) -> None:
    """And static where it does not, by looking at the model's own cache."""
    assert isinstance(build_engine(llama, EngineSettings()), ContinuousEngine)
    assert isinstance(build_engine(mamba, EngineSettings()), StaticEngine)


def test_a_setting_wins(llama: Model) -> None:
    """Whoever asks for the reference gets it."""
    assert isinstance(build_engine(llama, EngineSettings(kind="static")), StaticEngine)


def test_continuous_is_refused_where_it_cannot_be(mamba: Model) -> None:
    """A wish that cannot be met is a sentence and not another engine."""
    with pytest.raises(ModelError, match=r"engine\.kind is continuous, but"):
        build_engine(mamba, EngineSettings(kind="continuous"))
