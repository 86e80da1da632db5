"""Nothing that the library calls is on its way out: no library says so, by a warning or in its log."""

import logging
import re
import warnings

import pytest
import transformers
from transformers.utils import logging as said

import lofit_fast as lf
from lofit_fast.models.load import load_model
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.tiny_runs import EXAMPLES, HELD_OUT, QUICK, fit

ON_ITS_WAY_OUT = re.compile(r"deprecat|will be removed|no longer supported|in a future version", re.IGNORECASE)


@pytest.fixture
def log():
    """The messages that transformers, accelerate and torch log meanwhile, each told even if it was told before."""
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(f"{record.name}: {record.getMessage()}")

    keep, verbosity = Keep(), said.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate", "torch")]
    said.set_verbosity_warning()
    said.warning_once.cache_clear()
    for logger in loggers:
        logger.addHandler(keep)
    yield messages
    for logger in loggers:
        logger.removeHandler(keep)
    said.set_verbosity(verbosity)


def test_a_whole_run_calls_nothing_deprecated(log, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = load_model(str(tmp_path / "base"), device="cpu")
        result = fit(model, tmp_path / "run", QUICK, EXAMPLES[:4], eval_data=HELD_OUT)
        lf.export(result.handle, tmp_path / "plain")
        assert lf.verify_export(result.handle, tmp_path / "plain")
        result.handle.unpatch()
        lf.load(model, tmp_path / "run" / "adapter").merge()
    told = [f"{one.category.__name__} at {one.filename}: {one.message}" for one in caught]
    # torch tells itself of its own old parts
    told = [text for text in told if "/torch/" not in text.split(": ")[0]]
    assert [text for text in (*told, *log) if ON_ITS_WAY_OUT.search(text)] == []


def test_what_is_logged_is_seen(log):
    transformers.logging.get_logger("transformers.models.auto").warning_once("`old` is deprecated")
    assert [text for text in log if ON_ITS_WAY_OUT.search(text)] == ["transformers.models.auto: `old` is deprecated"]


def test_our_own_call_of_what_is_deprecated_is_an_error():
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
