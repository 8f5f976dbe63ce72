"""What is said of a prompt before it is encoded."""

import logging

from atlasvid_cli.text import left_out, unknown_words
from atlasvid_cli.train_text import build_tokenizer


def test_what_a_long_prompt_leaves_out_is_told_by_us_alone(caplog, monkeypatch):
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 4
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert left_out("a red ball moving right over blue hills", tokenizer, 4) == "moving right over blue hills"
    assert unknown_words("a red zebra", tokenizer) == ["zebra"]
    assert not caplog.records
