"""The benchmark of training runs from end to end at a size where nothing is to be learnt from its times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "sae_training.py"


@pytest.mark.slow
def test_the_quick_benchmark_compares_every_library_that_is_there_and_names_the_others(tmp_path):
    out = tmp_path / "quick.json"
    subprocess.run([sys.executable, SCRIPT, "--quick", "--out", out], check=True, capture_output=True)
    result = json.loads(out.read_text())
    (speed,) = result["speed"]
    for architecture in ("topk", "batchtopk"):
        for kind in ("float32", "bfloat16", "int8"):
            ratios = speed["ratios"][f"safedig {architecture} {kind}"]
            assert ratios["sae_lens"]["peer"] == f"sae_lens {architecture} float32"
            assert 0 < ratios["fastest_peer"]["min"] <= ratios["fastest_peer"]["median"]
            assert not ratios["fastest_peer"]["peer"].startswith("safedig")
    for library in ("dictionary_learning", "sparsify"):
        timed = any(name.startswith(library) for name in speed["rows_per_s"])
        assert timed != (library in speed) and (timed or speed[library].startswith("not installed: pip install"))
    assert [part["data"] for part in result["quality"]] == ["planted", "tiny-flux"]
    for part in result["quality"]:
        assert all(learnt["fvu"] > 0 for learnt in part["learnt"].values())
        assert part["learnt"]["safedig topk float32"]["fvu_ratio"] == pytest.approx(1, rel=0.01)
    assert result["machine"]["cores"] > 0
