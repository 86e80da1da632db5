"""The 4-bit example, on its tiny model."""

import json
from importlib.util import find_spec

import pytest

from examples import four_bit


@pytest.mark.skipif(not (find_spec("bitsandbytes") or find_spec("torchao")), reason="no quantizer is installed")
def test_four_bit_example(capsys):
    report = four_bit.main(["--epochs", "1"])
    assert json.loads(capsys.readouterr().out) == report
    assert report["quantized by"] == ("bitsandbytes" if find_spec("bitsandbytes") else "torchao")
    assert report["trained numbers"] == 2 * 32
    assert len(report["losses"]) == 2
    # torchao keeps a byte for each weight
    assert report["ratio"] > (4 if find_spec("bitsandbytes") else 2.5)
    assert report["peak memory, bytes"] > report["weights in 4 bits, bytes"]
