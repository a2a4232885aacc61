from pathlib import Path

import pytest

from interlock.testing.text_files import byte_fallback_tokenizer, write_text_files
from interlock.text.model import TextModel


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.load(write_text_files(tmp_path_factory.mktemp("byte-level")))


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.load(
        write_text_files(tmp_path_factory.mktemp("byte-fallback"), tokenizer=byte_fallback_tokenizer())
    )


@pytest.fixture(scope="session", params=["byte-level", "byte-fallback"])
def model(request: pytest.FixtureRequest, byte_level: TextModel, byte_fallback: TextModel) -> TextModel:
    return byte_level if request.param == "byte-level" else byte_fallback


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_text_files(tmp_path)
