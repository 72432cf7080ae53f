"""Tokenizers as GGUF vocabularies: what is said, and what llama.cpp would do otherwise is refused."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quant.checkpoints.gguf_tokenizer import SPLITS, read_vocabulary
from quant.checkpoints.protocol import CheckpointError

PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "c", "ab", "▁a", "abc", "▁ab", "▁abc"]


def sentencepiece(**changes):
    """A BPE tokenizer over characters as Llama 2 has it: every pair that makes a token is a merge."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in PIECES[8:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    options = {"vocab": vocabulary, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"} | changes
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def read(tokenizer, folder, size=400):
    (folder / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str())
    return read_vocabulary(folder, size)


def test_sentencepiece_has_scores_by_merge(tmp_path):
    found = read(sentencepiece(), tmp_path, 15)
    assert (found.model, found.pre, found.space_prefix) == ("llama", "default", True)
    assert found.tokens == (*PIECES, "[PAD13]", "[PAD14]")
    assert found.types == (2, 3, 3, 6, *[1] * 9, 5, 5)
    assert found.scores[8:13] == (-0.0, -1.0, -2.0, -3.0, -4.0)
    assert (found.first, found.last) == (1, None)


def test_metaspace_says_the_same_as_normalizers(tmp_path):
    tokenizer = sentencepiece()
    tokenizer.normalizer = None
    for scheme, expected in (("first", True), ("always", True), ("never", False)):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        assert read(tokenizer, tmp_path).space_prefix is expected


def test_added_tokens_are_control_or_user_defined(tmp_path, byte_level):
    byte_level(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool>")])
    found = read(tokenizer, tmp_path)
    assert found.types[0] == 3
    assert found.tokens[300:302] == ("<tool>", "[PAD301]")
    assert found.types[300:302] == (4, 5)
    assert (found.first, found.last) == (None, None)


@pytest.mark.parametrize("name", SPLITS.values())
def test_splits_are_told_apart(name, tmp_path, byte_level):
    expression, merged = next(key for key, value in SPLITS.items() if value == name)
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    byte_level(tmp_path, split, ignore_merges=merged)
    assert read_vocabulary(tmp_path, 300).pre == name
    byte_level(tmp_path, split, ignore_merges=not merged)
    with pytest.raises(
        CheckpointError, match=r"Tokenizer must split text as one of gpt-2, smollm, llama-bpe"
    ):
        read_vocabulary(tmp_path, 300)


def test_digits_before_bytes_are_known(tmp_path, byte_level):
    byte_level(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert read(tokenizer, tmp_path).pre == "smollm"


def changed(tokenizer, **parts):
    return json.dumps({**json.loads(tokenizer.to_str()), **parts})


def test_what_llama_cpp_would_not_do_is_refused(tmp_path, byte_level):
    byte_level(tmp_path)
    bytewise = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True)
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    twice = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 2 + [{"Sequence": {"id": "A", "type_id": 0}}]
    both = [*twice, {"Sequence": {"id": "B", "type_id": 0}}]
    tokens = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template |= {"single": twice, "pair": both, "special_tokens": tokens}
    model = json.loads(sentencepiece().to_str())["model"]
    merges = model["merges"]
    cases = {
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str(): "be BPE or WordPiece to be written.*Got WordLevel",
        changed(bytewise, normalizer={"type": "Lowercase"}): "leave text as it is before splitting",
        changed(bytewise, pre_tokenizer=json.loads(spaced.__getstate__())): "split text as one of gpt-2",
        changed(sentencepiece(), pre_tokenizer={"type": "Whitespace"}): "only turn spaces into ▁",
        changed(sentencepiece(), post_processor=template): "add at most one token before and one after",
        changed(sentencepiece(), model={**model, "merges": merges[1:]}): r"list every pair.*no \('a'",
        changed(sentencepiece(), model={**model, "merges": [*merges[:3], *merges[4:], merges[3]]}):
            "merge token by token",
        changed(sentencepiece(), model={**model, "end_of_word_suffix": "</w>"}): "have no end_of_word_suffix",
        changed(sentencepiece(), model={**model, "vocab": {**model["vocab"], "x": 8}}): "Got an id twice",
        changed(sentencepiece(), model={**model, "vocab": {**model["vocab"], "x": -1}}): r"Got \[-1\]",
        changed(sentencepiece(), decoder={"type": "Mystery"}): "be a tokenizer.json of the tokenizers library",
        "{}": "be a tokenizer.json of the tokenizers library",
        "[1": "be a tokenizer.json of the tokenizers library",
    }  # fmt: skip
    for text, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            read(text, tmp_path)
    with pytest.raises(CheckpointError, match=r"have ids of one token each below 299.*Got \[299\]"):
        read(bytewise, tmp_path, 299)


def test_word_pieces_begin_words_with_a_space(tmp_path, word_pieces):
    size = word_pieces(tmp_path)
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    found = read_vocabulary(tmp_path, size + 1)
    assert (found.model, found.pre, found.first, found.last, found.unknown) == ("bert", "default", 2, 3, 1)
    assert (found.lowercase, found.strip_accents, found.scores) == (True, True, None)
    for token, number in own.items():
        spelled = token if number < 5 else token[2:] if token.startswith("##") else f"▁{token}"
        assert (found.tokens[number], found.types[number]) == (spelled, 3 if number < 5 else 1)
    assert found.tokens[size] == f"[PAD{size}]"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"lowercase": False}, (False, False)),
        ({"lowercase": True, "strip_accents": False}, (True, False)),
        ({"lowercase": False, "strip_accents": True}, (False, True)),
    ],
)
def test_what_is_done_to_letters_is_told(told, expected, tmp_path, word_pieces):
    found = read_vocabulary(tmp_path, word_pieces(tmp_path, **told))
    assert (found.lowercase, found.strip_accents) == expected


def test_padding_and_truncation_say_nothing_about_ends(tmp_path, word_pieces):
    word_pieces(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(2)
    assert read(tokenizer, tmp_path).last == 3


def test_word_pieces_of_another_kind_are_refused(tmp_path, word_pieces):
    word_pieces(tmp_path)
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    content = json.loads(own.to_str())
    model, normalizer = content["model"], content["normalizer"]
    tool = {**content["added_tokens"][0], "content": "<tool>", "id": 300, "special": False}
    cases = {
        changed(own, normalizer={"type": "Lowercase"}): "have a BertNormalizer and a BertPreTokenizer",
        changed(own, pre_tokenizer=None): "have a BertNormalizer and a BertPreTokenizer",
        changed(own, normalizer={**normalizer, "clean_text": False}): "have clean_text",
        changed(own, normalizer={**normalizer, "handle_chinese_chars": False}): "have handle_chinese_chars",
        changed(own, model={**model, "continuing_subword_prefix": "@@"}): "mark tokens that go on with ##",
        changed(own, model={**model, "unk_token": "nothing"}): "know its unk_token.*nothing",
        changed(own, post_processor=None): "put one token before and one after a text",
        changed(own, added_tokens=[*content["added_tokens"], tool]): "no added tokens but special ones",
        changed(own, model={**model, "vocab": {**model["vocab"], "##[CLS]": 301}}): "differ without ##",
    }
    for text, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            read(text, tmp_path)


def test_other_tokenizer_files_alone_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"stored as tokenizer\.json.*Got only tokenizer\.model"):
        read_vocabulary(tmp_path, 10)


def test_a_folder_without_tokenizer_files_has_no_vocabulary(tmp_path):
    assert read_vocabulary(tmp_path, 10) is None
