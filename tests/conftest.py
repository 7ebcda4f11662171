"""Every test starts from the same seed, on one thread, without network or library noise."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that a test starts, too

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

import shadowpeft  # noqa: E402, F401  (registers the method with PEFT)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a run file's threads hold for the whole process


@pytest.fixture(autouse=True, scope="module")
def _nothing_old_is_searched_for_garbage():
    """Trainers collect garbage often. What lives before a file's tests outlives them: imported modules, collected tests."""
    gc.collect()
    gc.freeze()
