"""Task diffusion: the noise of one step, its images and its faults, and folders of the diffusers library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sensitivity.diffusers_models import CLASSES
from sensitivity.errors import BadCalibration, BadModel, ModelAlreadyQuantized
from sensitivity.model_loading import load_model, load_skeleton
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource
from sensitivity.structural_similarity import structural_similarity
from sensitivity.tasks.diffusion import Diffusion
from sensitivity.tasks.task import Batch, Outputs
from sensitivity.units import MeasureUnit, ScoreUnit

GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


class Returns(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, sample: Tensor) -> Tensor:
        return self.output


def outputs_of(output: Tensor, batch: Batch) -> Outputs:
    return Diffusion().outputs(Returns(output), batch)


def test_variances_beside_the_noise_do_not_count() -> None:
    predicted, batch = noise(3, 4, 8, 8), Batch({"sample": noise(3, 2, 8, 8)}, None, None, 3)
    assert torch.equal(outputs_of(predicted, batch).rows, predicted[:, :2].flatten(1))


def test_the_divergence_is_the_relative_error_of_the_noise() -> None:
    x, y = noise(3, 1, 8, 8), noise(3, 1, 8, 8)
    batch = Batch({"sample": noise(3, 1, 8, 8)}, None, None, 3)
    expected = [float(((a - b) ** 2).sum() / (a**2).sum()) for a, b in zip(x, y, strict=True)]
    found = Diffusion().divergence(outputs_of(x, batch), outputs_of(y, batch))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    quality = Diffusion().quality(outputs_of(y, batch), batch, outputs_of(x, batch))
    np.testing.assert_allclose(quality["sqnr"], [-10 * np.log10(value) for value in expected], rtol=1e-5)
    same = Diffusion().quality(outputs_of(x, batch), batch, outputs_of(x, batch))
    assert same["sqnr"].tolist() == [200.0] * 3
    assert same["ssim"].tolist() == pytest.approx([1.0] * 3)


def test_similarity_is_of_clean_images_where_the_signal_is_known() -> None:
    clean, wrong = noise(3, 1, 8, 8), noise(3, 1, 8, 8)
    signal = torch.tensor([0.9, 0.5, 0.1])
    share = signal[:, None, None, None]

    def noisy_with(image: Tensor, other: Tensor) -> Tensor:
        """The noise that leads from `other` to where `image` is after true noise of 1."""
        x = share.sqrt() * image + (1 - share).sqrt()
        return (x - share.sqrt() * other) / (1 - share).sqrt()

    x = share.sqrt() * clean + (1 - share).sqrt()
    plain, known = (
        Batch({"sample": x}, None, None, 3),
        Batch({"sample": x}, None, None, 3, {"alphas_cumprod": signal}),
    )
    true, other = noisy_with(clean, clean), noisy_with(clean, wrong)
    for batch, pair in ((known, (clean, wrong)), (plain, (true, other))):
        found = Diffusion().quality(outputs_of(other, batch), batch, outputs_of(true, batch))["ssim"]
        expected = structural_similarity(*pair)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_squared_error_of_the_true_noise() -> None:
    truth, predicted = noise(3, 1, 8, 8), noise(3, 1, 8, 8)
    batch = Batch({"sample": noise(3, 1, 8, 8)}, truth, None, 3)
    outputs = outputs_of(predicted, batch)
    expected = (predicted - truth).square().mean((1, 2, 3))
    np.testing.assert_allclose(Diffusion().losses(outputs, batch), expected, rtol=1e-6)
    assert float(Diffusion().loss(outputs, batch)) == pytest.approx(float(expected.mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("inputs", "labels", "signal", "words"),
    [
        ({"image": noise(3, 1, 8, 8)}, None, None, "noisy images must be named sample or hidden_states"),
        ({"sample": noise(3, 64)}, None, None, r"\(samples, channels, height, width\). Got sample \(3, 64\)"),
        ({"sample": noise(3, 1, 8, 8)}, torch.zeros(3), None, "labels must be the true noise"),
        (
            {"sample": noise(3, 1, 8, 8)},
            None,
            torch.tensor([0.5, 0.0, 1]),
            "above 0 and at most 1. Got 0.0 in row 1",
        ),
        ({"sample": noise(3, 1, 8, 8)}, None, torch.zeros(3, 2), "one number per sample"),
    ],
)
def test_unusable_steps_are_named(inputs: Any, labels: Any, signal: Any, words: str) -> None:
    extras = {} if signal is None else {"alphas_cumprod": signal}
    with pytest.raises(BadCalibration, match=words):
        Diffusion().check(Batch(inputs, labels, None, 3, extras))


def test_a_model_of_another_size_is_refused() -> None:
    with pytest.raises(BadModel, match="images of the size it is given"):
        outputs_of(noise(3, 1, 4, 4), Batch({"sample": noise(3, 1, 8, 8)}, None, None, 3))


def test_ssim_and_quality_of_a_session_are_those_of_the_task(tiny: Any) -> None:
    session = Session(tiny("denoiser").spec())
    row = session.run(ScoreUnit("conv_in", "w2", ("ssim",))).scores[0]
    pairs = list(session.forwards.pairs("scoring", (("conv_in", "w2"),)))
    found = np.concatenate([session.task.quality(p.outputs, p.batch, p.reference)["ssim"] for p in pairs])
    assert row.value == pytest.approx(found.mean())
    assert row.stderr == pytest.approx(found.std(ddof=1) / len(found) ** 0.5)
    assert pairs[0].batch.extras["alphas_cumprod"].shape == (4,)
    facts = session.run(MeasureUnit((("conv_in", "w2"),), "choosing")).facts
    assert set(facts["quality"]) == {"ssim", "sqnr"}
    assert 0 < facts["quality"]["ssim"]["mean"] < 1


# -- folders of diffusers -----------------------------------------------------------------------------


SMALL = {"in_channels": 1, "out_channels": 1, "sample_size": 8}
HEADS = {**SMALL, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 1}
UNET = {
    **SMALL,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "UNet2DModel": UNET | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": UNET | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 4,
    },
    "DiTTransformer2DModel": HEADS | {"num_embeds_ada_norm": 10},
    "PixArtTransformer2DModel": HEADS | {"cross_attention_dim": 16, "caption_channels": 6, "out_channels": 2},
}  # fmt: skip
INPUTS: dict[str, dict[str, Tensor]] = {
    "UNet2DModel": {"sample": noise(9, 1, 8, 8)},
    "UNet2DConditionModel": {"sample": noise(9, 1, 8, 8), "encoder_hidden_states": noise(9, 3, 4)},
    "DiTTransformer2DModel": {
        "hidden_states": noise(9, 1, 8, 8), "class_labels": torch.arange(9, dtype=torch.uint8)
    },
    "PixArtTransformer2DModel": {"hidden_states": noise(9, 1, 8, 8), "encoder_hidden_states": noise(9, 3, 6)},
}  # fmt: skip
ROLES = {
    "UNet2DModel": {"convolution", "self_attention", "embedding"},
    "UNet2DConditionModel": {"convolution", "self_attention", "cross_attention", "feed_forward", "embedding"},
    "DiTTransformer2DModel": {"convolution", "self_attention", "feed_forward", "embedding", "other"},
    "PixArtTransformer2DModel": {
        "convolution", "self_attention", "cross_attention", "feed_forward", "embedding", "other"
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder(class name): a tiny model with random weights, saved by diffusers itself."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            import diffusers

            torch.manual_seed(1)
            built[name] = tmp_path_factory.mktemp(name)
            getattr(diffusers, name)(**SETTINGS[name]).save_pretrained(built[name])
        return built[name]

    return build


def load(folder: Path, task: str = "auto") -> Any:
    return load_model(ModelSource("folder", str(folder), "d"), task, torch.device("cpu"))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_loaded_and_scored_with_its_roles(
    folder: Any, tmp_path: Path, name: str, tiny: Any
) -> None:
    steps = torch.randint(0, 1000, (9,), generator=GENERATOR, dtype=torch.int32)
    data = tmp_path / "steps.safetensors"
    save_file({**INPUTS[name], "timestep": steps}, data)
    spec = tiny("denoiser").spec(
        task="auto",
        model=ModelSource("folder", str(folder(name)), "d"),
        calibration=DataSource(str(data), "safetensors", "e"),
    )
    session = Session(spec)
    assert (session.task_name, type(session.model).__name__) == ("diffusion", name)
    layers = session.inventory.layers
    assert {layer.role for layer in layers} == ROLES[name]
    assert all(layer.macs for layer in layers)
    crossed = {layer.name for layer in layers if layer.role == "cross_attention"}
    assert crossed == {layer.name for layer in layers if ".attn2." in layer.name}
    rows = session.run(ScoreUnit(layers[-1].name, "w2", ("ssim", "sqnr", "output_kl"))).scores
    assert 0 < rows[0].value < 1
    assert rows[1].value > 0 < rows[2].value
    skeleton = load_skeleton(folder(name))
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in session.model.named_parameters()
    }


DIT = "DiTTransformer2DModel"


@pytest.fixture
def copy(folder: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder(DIT), tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_are_the_stored_ones_in_their_precision(copy: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in load_file(copy / WEIGHTS).items()}
    save_file(stored, copy / WEIGHTS, {"format": "pt"})
    state = load(copy).model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_what_the_files_lack_is_named_before_it_is_allocated(copy: Path) -> None:
    load_skeleton(copy)
    edit(copy / "config.json", num_layers=30)
    with pytest.raises(BadModel, match=r"config.json says. Got transformer_blocks\.1\.") as caught:
        load_skeleton(copy)
    assert "more otherwise" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("proj_out_2.weight"), "must be in the folder's weights. Got proj_out_2.weight"),
        (lambda w: w.update({"more.weight": torch.ones(2, 2)}), "must be known .* Got more.weight"),
        (
            lambda w: w.update({"proj_out_2.weight": torch.ones(3, 16)}),
            "shape that config.json says. Got proj_out_2",
        ),
    ],
)
def test_other_weights_than_the_configuration_says_are_refused(copy: Path, change: Any, words: str) -> None:
    weights = load_file(copy / WEIGHTS)
    change(weights)
    save_file(weights, copy / WEIGHTS, {"format": "pt"})
    with pytest.raises(BadModel, match=words):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, BadModel, "must be one of UNet2DModel"),
        ({"_class_name": ["UNet2DModel"]}, BadModel, "must be one of UNet2DModel"),
        ({"auto_map": {"x": "y.Z"}}, BadModel, "remote code, which is never run"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            ModelAlreadyQuantized,
            "send the original",
        ),
        ({"num_attention_heads": "many"}, BadModel, "the model folder must load"),
    ],
)
def test_configurations_that_are_not_built(copy: Path, changes: Any, error: Any, words: str) -> None:
    edit(copy / "config.json", **changes)
    with pytest.raises(error, match=words):
        load(copy)


def test_tasks_and_libraries_must_fit(copy: Path, tiny: Any) -> None:
    with pytest.raises(BadModel, match="task diffusion or generic. Got 'causal_lm'"):
        load(copy, "causal_lm")
    assert load(copy, "generic").task == "generic"
    with pytest.raises(BadModel, match="needs a model of the diffusers library"):
        load(tiny("llama").folder, "diffusion")


def test_shards_are_read_by_their_index(copy: Path, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    DiTTransformer2DModel.from_pretrained(copy).save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert (tmp_path / "shards" / f"{WEIGHTS}.index.json").is_file()
    one, many = (load(folder).model.state_dict() for folder in (copy, tmp_path / "shards"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_text_is_no_calibration(copy: Path, tiny: Any) -> None:
    text = tiny("llama").data
    spec = tiny("denoiser").spec(
        task="auto",
        model=ModelSource("folder", str(copy), "d"),
        calibration=DataSource(str(text), "text", "t"),
    )
    with pytest.raises(BadCalibration, match="diffusion must be given tensors. Got text"):
        Session(spec)
