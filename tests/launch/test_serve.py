"""`python -m launch.serve` as a user runs it: ready line, a request, SIGTERM; and one line for each mistake."""

import json
import signal
from pathlib import Path

import httpx
import pytest
from byte_model import byte_model, save
from programs import run, start

MODEL = byte_model(64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-model"
    save(folder, MODEL)
    return folder


def test_serving_a_folder_until_a_signal(folder: Path) -> None:
    flags = [f"--model={folder}", "--port=0", "--max_sequences=1", "--max_batch_tokens=16", "--api_key=k"]
    for number in (signal.SIGTERM, signal.SIGINT):
        server = start("launch.serve", *flags, anew=number == signal.SIGTERM)
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("serving tiny-model at http://127.0.0.1:"), server.communicate()
        body = {"model": "tiny-model", "prompt": "abc", "max_tokens": 4, "ignore_eos": True}
        url, key = f"{line.split()[-1]}/completions", {"authorization": "Bearer k"}
        answer = httpx.post(url, json=body, headers=key, timeout=600, trust_env=False)
        assert answer.json()["usage"]["completion_tokens"] == 4
        server.send_signal(number)
        rest, errors = server.communicate(timeout=600)
        assert server.returncode == 0, errors
        assert json.loads(rest.splitlines()[-1]) == {
            "model": "tiny-model",
            "prompt_tokens": 3,
            "generation_tokens": 4,
            "requests": 1,
            "recompilations": 0,
        }
        assert "Traceback" not in errors and "compiling" in errors


def test_serving_with_pages_on_the_host() -> None:
    flags = ["--max_sequences=2", "--max_batch_tokens=16", "--pages=40", "--page_size=4", "--port=0"]
    server = start("launch.serve", *flags, "--kv_host_gb=0.1", "--kv_host_share=0.5")
    assert server.stdout is not None
    url = server.stdout.readline().split()[-1]
    for prompt in ([5, 6, 7, 8] * 6, [8, 7, 6, 5] * 6, [9, 8] * 12, [5, 6, 7, 8] * 6):
        body = {"model": "countdown", "prompt": prompt, "max_tokens": 30, "ignore_eos": True}
        answer = httpx.post(f"{url}/completions", json=body, timeout=600, trust_env=False)
        assert answer.json()["usage"]["completion_tokens"] == 30
    found = httpx.get(f"{url.removesuffix('/v1')}/metrics", timeout=600, trust_env=False).text
    for space in ("device", "host", "free"):
        assert f'jaxstack:kv_pages{{model_name="countdown",space="{space}"}}' in found
    assert 'jaxstack:swap_bytes_total{direction="to_host",model_name="countdown"}' in found
    assert 'jaxstack:swap_host_share{model_name="countdown"} 0.5' in found
    shown = httpx.get(f"{url.removesuffix('/v1')}/page/snapshot", timeout=600, trust_env=False).json()
    assert shown["swap"]["pages"]["device"] > 0 and len(shown["cells"]) == sum(shown["swap"]["pages"].values())
    assert (shown["swap"]["pages"]["host"] > 0) == any(cell.isupper() for cell in shown["cells"])
    server.send_signal(signal.SIGTERM)
    _, errors = server.communicate(timeout=600)
    assert server.returncode == 0 and "Traceback" not in errors, errors
    assert "swapping: 160 tokens without, " in errors and "a fixed share" in errors


def test_mistakes_get_one_line_and_a_code(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    keys = tmp_path / "keys"
    keys.write_text("# owners\na=1\na = 2\n")
    cases = {
        f"--model={tmp_path / 'nothing'}": (1, "nothing"),
        f"--model={broken}": (1, "config.json"),
        f"--model={folder} --page_size=12": (1, "page_size: found 12, expected a power of two"),
        f"--model={folder} --max_model_len=128": (1, "max_model_len: found 128"),
        f"--model={folder} --port=99999": (1, "port: found 99999"),
        f"--model={folder} --quantum=5": (1, "quantum: found 5 for the policy 'fcfs', expected none but for dlpm"),
        f"--model={folder} --policy=dlpm --quantum=0": (1, "quantum: found 0, expected an integer >= 1"),
        f"--model={folder} --client_weights=a=2,b": (2, "--client_weights: found 'b', expected NAME=WEIGHT"),
        f"--model={folder} --api_keys={broken}": (2, "cannot be read"),
        f"--model={folder} --api_keys={keys}": (2, "keys:3: found the name a second time, expected NAME=KEY"),
        f"--model={folder} --kv_host_gb=1 --kv_host_share=0.98": (2, "found 0.98, expected a number from 0 to 0.97"),
        f"--model={folder} --kv_host_gb=1 --kv_host_share=half": (2, "--kv_host_share: found 'half', expected auto"),
        f"--model={folder} --kv_host_share=0.5": (2, "--kv_host_share: found a number, expected --kv_host_gb > 0"),
        f"--model={folder} --kv_host_gb=1000000": (1, "kv_host_gb: found 1000000.0 GB, expected at most the "),
        f"--model={folder} --kv_host_gb=0.1 --speculation=3": (1, "swapping: found speculation = 3, expected 0"),
        f"--model={folder} stray": (2, "unexpected argument 'stray'"),
        "--port=many": (2, "--port=many"),
        "--colour=red": (2, "colour"),
    }
    for flags, (exit_code, message) in cases.items():
        done = run("launch.serve", *flags.split())
        assert "Traceback" not in done.stderr
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert message in said, flags
        assert done.returncode == exit_code, flags
