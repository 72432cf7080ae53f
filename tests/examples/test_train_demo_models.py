import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

pytest.importorskip("sklearn", reason="the demo extra is not installed")


@pytest.fixture(scope="module")
def cnn(script, tmp_path_factory):
    return script.train_cnn(tmp_path_factory.mktemp("cnn"), seed=3, quick=True)


def test_training_that_nobody_watches_tells_its_progress_in_lines(script, capsys):
    model = nn.Linear(2, 1)
    script.train(model, lambda: model(torch.ones(2)).square().sum(), 30, 0.1, "tiny")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" loss ")[0] for line in lines] == [f"tiny {n}/30" for n in range(3, 31, 3)]


@pytest.fixture(scope="module")
def lm(script, tmp_path_factory):
    return script.train_lm(tmp_path_factory.mktemp("lm"), seed=3, quick=True)


def layers(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def test_the_image_classifier_loads_back_and_reproduces_its_accuracy(cnn):
    model, report = AutoModelForImageClassification.from_pretrained(cnn.folder, output_loading_info=True)
    data = load_file(cnn.calibration)
    with torch.no_grad():
        predicted = model.eval()(pixel_values=data["pixel_values"]).logits.argmax(-1)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert float((predicted == data["labels"]).float().mean()) == pytest.approx(cnn.value)
    assert len(layers(model, nn.Conv2d)) == 13
    assert layers(model, nn.Linear) == ["classifier.1"]


def test_image_calibration_has_named_float_images_and_integer_labels_of_every_class(cnn):
    data = load_file(cnn.calibration)
    assert set(data) == {"pixel_values", "labels"}
    assert data["pixel_values"].dtype == torch.float32
    assert data["labels"].dtype == torch.int64
    assert data["pixel_values"].shape == (len(data["labels"]), 1, 32, 32)
    assert len(data["labels"]) >= 3 * 150
    assert set(data["labels"].tolist()) == set(range(10))


def test_image_calibration_is_unaltered_and_apart_from_the_training_images(
    script, cnn, monkeypatch, tmp_path
):
    trained_on = []
    monkeypatch.setattr(script, "shifted", lambda images, generator: trained_on.append(images) or images)
    monkeypatch.setattr(script, "QUICK_STEPS", 10)  # one epoch
    held_out = load_file(script.train_cnn(tmp_path, seed=3, quick=True).calibration)["pixel_values"]
    seen = {image.numpy().tobytes() for batch in trained_on for image in batch}
    every = {image.numpy().tobytes() for image in script.digit_images()[0]}
    calibration = {image.numpy().tobytes() for image in held_out}
    assert len(seen) == 900
    assert calibration <= every
    assert not calibration & seen


def test_the_language_model_loads_back_and_reproduces_its_perplexity(script, lm):
    model, report = AutoModelForCausalLM.from_pretrained(lm.folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(lm.folder, local_files_only=True)
    texts = [json.loads(line)["text"] for line in lm.calibration.read_text(encoding="utf-8").splitlines()]
    stream = script.packed(texts, tokenizer)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert script.perplexity(model.eval(), stream) == pytest.approx(lm.value)
    assert len(stream) >= 3 * 32 * script.SEQUENCE_LENGTH
    assert len(layers(model, nn.Linear)) == 28 + 1
    assert model.config.num_hidden_layers == 4


def test_the_saved_tokenizer_returns_any_text_unchanged(lm):
    tokenizer = AutoTokenizer.from_pretrained(lm.folder, local_files_only=True)
    for text in (
        "for x in range(3):\n    print(x)",
        "naïve – Größe 漢字 \t\n",
        lm.calibration.read_text("utf-8"),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 0
    assert json.loads((lm.folder / "config.json").read_text())["eos_token_id"] == 0


def test_no_paragraph_of_the_held_out_topics_is_in_the_training_text(script):
    training, held_out = script.split_topics(seed=3)
    paragraphs = {"".join(p.split()) for text in held_out for p in text.split("\n\n")}
    learned = {"".join(p.split()) for text in training for p in text.split("\n\n")}
    assert len(paragraphs) > 100
    assert len(learned) > 1000
    assert not paragraphs & learned


def test_passages_keep_every_paragraph_in_order(script):
    paragraphs = ["a" * 700, "b" * 700, "c", "d" * 1200, "e"]
    joined = script.passages(paragraphs, size=1000)
    assert "\n\n".join(joined).split("\n\n") == paragraphs
    assert all(len(text) >= 1000 for text in joined[:-1])


@pytest.mark.parametrize("name", ["cnn", pytest.param("lm", marks=pytest.mark.slow)])
def test_a_seed_decides_every_file(script, request, tmp_path, name):
    first = request.getfixturevalue(name)
    again = script.TRAINERS[name](tmp_path / "again", seed=3, quick=True)
    other = script.TRAINERS[name](tmp_path / "other", seed=4, quick=True)
    for file in first.folder.iterdir():
        assert (again.folder / file.name).read_bytes() == file.read_bytes(), file.name
    for file in ("model.safetensors", other.calibration.name):
        assert (other.folder / file).read_bytes() != (first.folder / file).read_bytes(), file


def test_the_learning_rate_warms_up_to_its_peak_and_ends_near_zero(script):
    rates = [script.learning_rate(step, 100, 2.0) for step in range(100)]
    assert max(rates) == pytest.approx(2.0)
    assert rates[0] < rates[5] < rates[9]
    assert rates[9] > rates[50] > rates[99]
    assert rates[99] < 0.05
