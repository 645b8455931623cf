import json

import numpy as np
import safetensors.numpy
from programs import ROOT, run

GOLDEN = ROOT / "tests" / "golden"


def test_merges_an_adapter_into_its_base_and_refuses_one_for_another_model(tmp_path):
    base, adapter = GOLDEN / "decoder" / "qwen2", GOLDEN / "training" / "adapter"
    flags = [f"--model={base}", f"--adapter={adapter}", f"--out={tmp_path / 'merged'}", "--dtype=float32"]
    done = run("launch.export", *flags)
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
    other = GOLDEN / "decoder" / "llama2"
    refused = run("launch.export", f"--model={other}", f"--adapter={adapter}", f"--out={tmp_path / 'no'}")
    assert refused.returncode == 1 and not (tmp_path / "no").exists()
    assert refused.stderr.splitlines()[-1].startswith("error: ") and "made for another model" in refused.stderr
