"""The examples with PEFT, on a tiny random model."""

import pytest

pytest.importorskip("peft")
from examples import lora_and_lofit, peft_bridge


@pytest.mark.parametrize("example", [peft_bridge, lora_and_lofit])
@pytest.mark.filterwarnings("ignore:patching has frozen")
def test_example_with_peft(example, tmp_path, capsys):
    losses = example.main(steps=8, output=tmp_path)
    assert losses[-1] < losses[0]
    assert list(tmp_path.rglob("adapter_config.json"))
    assert "merged" in capsys.readouterr().out
