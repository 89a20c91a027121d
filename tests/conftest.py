"""Fixtures shared by all tests.  No test needs the network; transformers is told so before it is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Processes that tests start are compared bit by bit with what happens here, and sums depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_model, make_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with its tokenizer, as a Hub repository holds them."""
    folder = make_model(tmp_path_factory.mktemp("teacher"), seed=1)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller student with the same tokenizer and vocabulary."""
    folder = make_model(tmp_path_factory.mktemp("student"), seed=2, num_hidden_layers=1)
    make_tokenizer(folder)
    return folder
