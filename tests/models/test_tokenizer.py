"""Tokenizers: folders there and back, the byte-level fallback, special tokens, chat prompts, and wrong files."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxstack.models.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from jaxstack.runtime.errors import UserError

BYTES = byte_tokenizer()
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]


def words(folder: Path, **config: object) -> Path:
    """A folder with a word-level tokenizer that puts <s> in front."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    pipeline = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    pipeline.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    pipeline.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return folder


@given(st.text(max_size=50))
def test_bytes_there_and_back(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    assert b"".join(BYTES.token_bytes(i) for i in ids) == text.encode()


def test_the_byte_tokenizer_has_bytes_as_ids_and_markers_after_them() -> None:
    assert BYTES.encode("aé") == list("aé".encode())
    assert (BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_ids, BYTES.vocab_size) == (
        256,
        257,
        (258, 260),
        261,
    )
    assert BYTES.encode("<|im_end|>") == [260] and BYTES.decode([97, 260, 98]) == "ab"
    assert BYTES.decode([97, 260], skip_special_tokens=False) == "a<|im_end|>"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UserError, match="surrogate"):
        BYTES.encode("a\ud800")


def test_a_folder_without_tokenizer_gets_bytes(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path).encode("a") == [97]


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.special_tokens == BYTES.special_tokens and again.special_ids == BYTES.special_ids
    assert again.render_chat(TALK) == BYTES.render_chat(TALK)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]


def test_special_tokens_and_ends(tmp_path: Path) -> None:
    folder = words(tmp_path, eos_token={"content": "</s>", "lstrip": False})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (1, (2,), None)
    assert tokenizer.encode("a b") == [1, 3, 4] and tokenizer.encode("a b", add_special_tokens=False) == [3, 4]
    assert tokenizer.id_to_token(3) == "a" and tokenizer.id_to_token(99) is None
    assert [tokenizer.token_bytes(i) for i in (3, 2, 99)] == [b" a", b" </s>", b""]
    # config.json counts unless generation_config.json says otherwise; the tokenizer's own end is kept.
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert load_tokenizer(folder).eos_token_ids == (2, 4)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 0]}))
    assert load_tokenizer(folder).eos_token_ids == (0, 2, 3)


def test_chat_prompts(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}({{ m.content|trim }}){% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = load_tokenizer(words(tmp_path, chat_template=template))
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(TALK) == "<s>(a)(b)>"
    assert tokenizer.render_chat(TALK, add_generation_prompt=False) == "<s>(a)(b)"
    assert tokenizer.render_chat(TALK, add_generation_prompt=False, continue_final_message=True) == "<s>(a)(b "
    with pytest.raises(UserError, match="exclude each other"):
        tokenizer.render_chat(TALK, continue_final_message=True)


def test_named_templates_and_the_file_of_its_own(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = words(tmp_path, chat_template=named)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat(TALK) == "plain" and tokenizer.render_chat(TALK, tools=[{}]) == "tools"
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").render_chat(TALK, tools=[{}]) == "tools"
    (folder / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(folder).render_chat(TALK) == "from the file"


def test_no_template_is_said_in_one_line(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(words(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match=r"no chat template; expected chat_template\.jinja"):
        tokenizer.render_chat(TALK)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer.json"),
        ("tokenizer.json", '{"model": 1}', "not a tokenizer.json"),
        ("tokenizer_config.json", "[]", "holds list, expected a JSON object"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"chat_template": 3}', "neither a string nor a list"),
        ("chat_template.jinja", "{% if %}", "not a valid Jinja template, line 1"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "expected an integer or a list"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = words(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_other_forms_of_tokenizers_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"found tokenizer\.model, expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such model folder"):
        load_tokenizer(tmp_path / "nothing")


def test_a_pipeline_without_a_plain_token_still_shows_its_tokens() -> None:
    pipeline = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<e>": 0}, unk_token="<e>"))
    assert Tokenizer(pipeline).token_bytes(0) == b" <e>"
