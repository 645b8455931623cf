"""Adapters over HTTP: loaded, listed, chosen by the field `model`, and unloaded."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from jaxstack.engine import Engine, SamplingParams
from jaxstack.serving import BackgroundServer


@pytest.fixture
def post(http: httpx.Client, server: BackgroundServer, engine: Engine) -> Iterator[object]:
    yield lambda what, **body: http.post(f"{server.base_url}/{what}_lora_adapter", json=body)
    for name in engine.adapters:
        engine.unload_adapter(name)


def test_a_life(post, client: openai.OpenAI, engine: Engine, adapter_folder: Path) -> None:  # type: ignore[no-untyped-def]
    def say(model: str) -> str:
        body = {"ignore_eos": True}
        answer = client.completions.create(model=model, prompt="hello", temperature=0, max_tokens=12, extra_body=body)
        assert answer.model == model
        return answer.choices[0].text

    plain = say("tiny")
    answer = post("load", lora_name="french", lora_path=str(adapter_folder))
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'french' added successfully."
    base, adapter = client.models.list().data
    assert (base.id, base.model_extra["parent"]) == ("tiny", None)
    assert (adapter.id, adapter.model_extra["parent"]) == ("french", "tiny")
    assert adapter.model_extra["root"] == str(adapter_folder) and client.models.retrieve("french").id == "french"
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    own = engine.generate(["hello"], params, adapter="french")[0].completions[0].text
    assert say("french") == own != plain == say("tiny")
    chat = client.chat.completions.create(model="french", messages=[{"role": "user", "content": "x"}], max_tokens=2)
    assert chat.model == "french"
    assert post("unload", lora_name="french").text == "Success: LoRA adapter 'french' removed successfully."
    with pytest.raises(openai.NotFoundError, match="'french' does not exist here"):
        say("french")
    assert [model.id for model in client.models.list()] == ["tiny"] and say("tiny") == plain


def test_what_is_refused(post, adapter_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert post("load", lora_name="a", lora_path=str(adapter_folder)).status_code == 200
    for answer, status, message in (
        (post("load", lora_name="a", lora_path=str(adapter_folder)), 400, "'a' is loaded already"),
        (post("load", lora_name="tiny", lora_path=str(adapter_folder)), 400, "the model's own name"),
        (post("load", lora_name="b", lora_path=str(tmp_path)), 400, "adapter_config.json"),
        (post("load", lora_name="b"), 400, "lora_path: missing"),
        (post("load", lora_name="", lora_path="x"), 400, "lora_name: found ''"),
        (post("load", lora_name=5, lora_path="x"), 400, "lora_name: found 5"),
        (post("unload", lora_name="b"), 404, "found 'b'"),
        (post("unload"), 400, "lora_name: missing"),
    ):
        assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
    assert post("load", lora_name="b", lora_path=str(adapter_folder)).status_code == 200
    assert "slots are taken" in post("load", lora_name="c", lora_path=str(adapter_folder)).json()["error"]["message"]
