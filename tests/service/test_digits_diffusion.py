"""A diffusion transformer trained on digits: what metric decoupling buys, and what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quant.plan import parse_plan
from sensitivity.session import Session
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.inputs import spec_of
from service.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS, SAMPLED, EPOCHS = 1000, 20, 1200
SIGNAL = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS), 0)
PARAMETERS: dict[str, Any] = {
    "budgets": ["3 bpw"],
    "schemes": ["w2", "w3", "w4", "w8"],
    "metrics": ["metric_decoupled", "output_kl"],
    "ratios": [0.5, 0.7, 1, 1.4, 2],
    "samples": 48,
    "batch_size": 32,
    "evaluations": 0,
    "interactions": False,
}


@dataclass(frozen=True)
class Digits:
    """The trained model's folder, denoising steps of its own sampler, and a judge of classes."""

    folder: Path
    steps: Path
    judge: Any


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    from diffusers import DiTTransformer2DModel
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = images / 8 - 1
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )
    train(model, torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels))
    folder = tmp_path_factory.mktemp("digits")
    model.save_pretrained(folder / "dit")
    return Digits(
        folder / "dit",
        calibration(model, folder / "steps.safetensors"),
        LogisticRegression(max_iter=300).fit(images, labels),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Predict the noise of a random step, AdamW, one cycle of learning rates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=EPOCHS)
    model.train()
    for _ in range(EPOCHS):
        rows, steps = torch.randint(0, len(images), (64,)), torch.randint(0, STEPS, (64,))
        noise, share = torch.randn(64, 1, 8, 8), SIGNAL[steps][:, None, None, None]
        noisy = share.sqrt() * images[rows] + (1 - share).sqrt() * noise
        predicted = model(noisy, timestep=steps, class_labels=labels[rows]).sample
        optimizer.zero_grad()
        (predicted - noise).square().mean().backward()
        optimizer.step()
        rates.step()
    model.eval()


@torch.no_grad()
def drawn(model: nn.Module, labels: Tensor, noise: Tensor, seen: list[Any] | None = None) -> Tensor:
    """Images by deterministic sampling (DDIM); `seen` collects what the model is given."""
    x, times = noise, torch.linspace(STEPS - 1, 0, SAMPLED).long()
    for now, later in zip(times, [*times[1:], None], strict=True):
        at = now.expand(len(x))
        if seen is not None:
            seen.append((x, at, labels, SIGNAL[at]))
        predicted = model(x, timestep=at, class_labels=labels).sample
        clean = ((x - (1 - SIGNAL[now]).sqrt() * predicted) / SIGNAL[now].sqrt()).clamp(-1, 1)
        if later is None:
            return clean
        left = (x - SIGNAL[now].sqrt() * clean) / (1 - SIGNAL[now]).sqrt()
        x = SIGNAL[later].sqrt() * clean + (1 - SIGNAL[later]).sqrt() * left
    raise AssertionError("unreachable")


def calibration(model: nn.Module, path: Path) -> Path:
    seen: list[Any] = []
    drawn(model, torch.arange(30) % 10, torch.randn(30, 1, 8, 8), seen)
    rows = torch.randperm(30 * SAMPLED)[:150]
    names = ("hidden_states", "timestep", "class_labels", "alphas_cumprod")
    columns = (torch.cat(column)[rows].contiguous() for column in zip(*seen, strict=True))
    save_file(dict(zip(names, columns, strict=True)), path)
    return path


@pytest.fixture(scope="module")
def found(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Session]:
    """The plan of a search with metric_decoupled, and a session like its workers."""
    folder = tmp_path_factory.mktemp("search")
    settings = Settings(
        data_dir=folder, database_url=f"sqlite:///{folder}/bitplan.db", executor="in_process", workers=1
    )
    with Local(settings) as local:
        source, data = folder_source(digits.folder), file_data(digits.steps)
        wanted = local.request(local.model(source), local.calibration(data), PARAMETERS)
        job = local.run(wanted)
        assert job.state == "succeeded", job.problem
        [answer] = local.plans(job.id)
    return answer, Session(spec_of(wanted, source, data.source))


def measured(session: Session, assignment: dict[str, str]) -> tuple[float, float]:
    """(relative error of the noise, loss of structural similarity) on the choosing part."""
    noise, similar = [], []
    for pair in session.forwards.pairs("choosing", tuple(assignment.items())):
        noise.append(session.task.divergence(pair.reference, pair.outputs))
        similar.append(session.task.quality(pair.outputs, pair.batch, pair.reference)["ssim"])
    return float(np.concatenate(noise).mean()), float(1 - np.concatenate(similar).mean())


def test_content_layers_are_judged_by_similarity(found: tuple[Any, Session]) -> None:
    answer, session = found
    plan = parse_plan(json.dumps(answer["document"]))
    roles = {layer.name: layer.role for layer in session.inventory.layers}
    content = {name for name, metric in (plan.decided_by or {}).items() if metric == "ssim"}
    assert content == {name for name, role in roles.items() if role == "feed_forward"}
    assert set((plan.decided_by or {}).values()) == {"ssim", "sqnr"}


def test_the_plan_trades_noise_for_structure(found: tuple[Any, Session]) -> None:
    """The sweep spans a trade; the plan is the best product of both and no candidate beats it in both."""
    answer, _ = found
    tried = {item["source"]: item["measured"]["mean"] for item in answer["candidates"]}
    assert sum(source.startswith("decoupled") for source in tried) >= 3
    assert "additive output_kl" in tried
    assert tried[answer["source"]] == min(tried.values())


def test_the_plan_of_noise_alone_is_not_better_in_both(
    found: tuple[Any, Session], digits: Digits, tmp_path: Path
) -> None:
    answer, session = found
    plan = parse_plan(json.dumps(answer["document"])).assignment
    settings = Settings(
        data_dir=tmp_path, database_url=f"sqlite:///{tmp_path}/bitplan.db", executor="in_process", workers=1
    )
    with Local(settings) as local:
        source, data = folder_source(digits.folder), file_data(digits.steps)
        wanted = PARAMETERS | {"metrics": ["output_kl"]}
        job = local.run(local.request(local.model(source), local.calibration(data), wanted))
        [other] = local.plans(job.id)
    noise, structure = measured(session, plan)
    noise_alone, structure_alone = measured(session, parse_plan(json.dumps(other["document"])).assignment)
    assert noise * structure <= noise_alone * structure_alone * (1 + 1e-9)
    assert noise >= noise_alone or structure <= structure_alone


def test_images_keep_their_classes_better_than_at_two_bits(
    found: tuple[Any, Session], digits: Digits
) -> None:
    answer, session = found
    plan = parse_plan(json.dumps(answer["document"])).assignment
    labels, noise = (
        torch.arange(200) % 10,
        torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
    )

    def classes(assignment: dict[str, str]) -> Any:
        with session.weights.swapped(tuple(assignment.items())):
            return digits.judge.predict(drawn(session.model, labels, noise).flatten(1).numpy())

    full = classes({})
    assert (full == labels.numpy()).mean() > 0.5, "the model must draw digits"
    kept = [(classes(chosen) == full).mean() for chosen in (plan, dict.fromkeys(plan, "w2"))]
    assert kept[0] > kept[1] + 0.1
