import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"


def export(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.export", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_merges_an_adapter_into_its_base_and_refuses_one_for_another_model(tmp_path):
    base, adapter = GOLDEN / "decoder" / "qwen2", GOLDEN / "training" / "adapter"
    done = export(f"--model={base}", f"--adapter={adapter}", f"--out={tmp_path / 'merged'}", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == {"model_folder": str(tmp_path / "merged"), "merged_modules": 9, "dtype": "float32"}
    before, after = (safetensors.numpy.load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    factors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    module = "model.layers.2.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    # rsLoRA with alpha 3 and rank 4, as the adapter's alpha_pattern says for q_proj.
    expected = before[f"{module}.weight"].astype(np.float32) + 3 / np.sqrt(4) * b @ a
    np.testing.assert_allclose(after[f"{module}.weight"], expected, atol=1e-6)
    refused = export(f"--model={GOLDEN / 'decoder' / 'llama2'}", f"--adapter={adapter}", f"--out={tmp_path / 'no'}")
    assert refused.returncode == 1 and not (tmp_path / "no").exists()
    assert refused.stderr.splitlines()[-1].startswith("error: ") and "made for another model" in refused.stderr
