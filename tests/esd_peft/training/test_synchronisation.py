"""The loops never wait for the device between two readings of the loss.

The meta device stands for a GPU. Its tensors hold nothing, so a host that reads from one (`.item()`, `if tensor`, a boolean
mask as an index, `nonzero`) fails by itself; copies to and from it are seen on their way.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import esd_kernels
from esd_peft.config import EraseConfig
from esd_peft.models import open_backbone
from esd_peft.models.flux import Flux
from esd_peft.prompts.plan import plan_prompts
from esd_peft.runtime.profiling import Costs
from esd_peft.training.contrastive import Contrastive
from esd_peft.training.esd import GuidedTarget
from esd_peft.training.rollout import Rollout, make_table
from esd_peft.training.student import make_student
from esd_peft.training.trainer import distill
from families import save_family

META = torch.device("meta")
aten = torch.ops.aten


class Traffic(TorchDispatchMode):
    """Refuses copies that wait, answers what the host reads, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.readings = self.fetched = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.readings += 1
            return 1.0
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None and torch.device(target).type != args[0].device.type:
            assert kwargs.get("non_blocking"), "a copy that waits"
            if args[0].is_meta:
                self.fetched += 1
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if func is aten.copy_.default:
            assert args[0].device == args[1].device or not args[1].dim(), "a copy that waits"
        return func(*args, **kwargs)


@pytest.fixture
def on_meta(monkeypatch):
    """Takes out what the meta device does not have: autocast, and Triton's interpreter."""
    plain = torch.tensor

    def on_the_host(data, **options):
        assert torch.device(options.get("device") or "cpu").type == "cpu", "a copy that waits"
        return plain(data, **options)

    def run(student, objective):
        with monkeypatch.context() as patch, Traffic() as traffic:
            patch.setattr(torch, "tensor", on_the_host)
            patch.setattr(torch.Tensor, "new_tensor", on_the_host)  # fails: it would be on the device
            losses = distill(student, objective, torch.Generator())
        return losses, traffic

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(esd_kernels.guided_mse.__globals__["os"], "environ", {})
    return run


def setup(path, **options):
    defaults = {
        "concept": [{"name": "circle", "map_to": "square"}, "red"],
        "preserve": ["a square"],
        "num_inference_steps": 3,
        "trajectories": 3,
        "train_batch_size": 4,
        "max_train_steps": 12,
        "hold": 0.25,
        "snr_gamma": 5.0,
    }
    config = EraseConfig(**(defaults | options))
    backbone = open_backbone(str(path))
    plan = plan_prompts(config)
    embeds = {k: v.to(META) for k, v in backbone.encode(plan.texts, torch.device("cpu"), torch.float32).items()}
    denoiser = backbone.load_denoiser(torch.float32).to(META)
    linear = [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    widths = {kind: layer.in_features for name, layer in linear if (kind := backbone.prompt_input(name))}
    projections = {kind: torch.empty(width, width, device=META) for kind, width in widths.items()}
    student = make_student(backbone, denoiser, config, projections)
    table = make_table(plan, embeds)
    return Rollout(backbone, denoiser, table, student.teacher, config, META, torch.float32, Costs(META)), student


@pytest.mark.parametrize(
    "options",
    [{}, {"rollout": "student", "refill_every": 6}, {"adapter": "none"}, {"gradient_checkpointing": True}],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_the_host_reads_the_loss_and_nothing_else(small_sd, on_meta, options):
    rollout, student = setup(small_sd, **options)
    losses, traffic = on_meta(student, GuidedTarget(rollout))
    assert traffic.readings == len(losses) == 2  # after 10 and 12 steps
    refills = 2 if "rollout" in options else 1
    assert 0 < traffic.fetched <= refills * 4 * 3  # four tensors of each of three denoising steps


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev", "pixart", "sana"])
def test_in_every_family(tmp_path, on_meta, monkeypatch, name):
    monkeypatch.setattr(Flux, "latent_size", lambda self, denoiser: (16, 16))
    rollout, student = setup(save_family(name, tmp_path / "model"), snr_gamma=None)
    losses, traffic = on_meta(student, GuidedTarget(rollout))
    assert traffic.readings == len(losses)


def test_contrastive_too(small_sd, on_meta):
    options = {"objective": "contrastive", "concept": "circle", "snr_gamma": None, "hold": None, "trajectories": None}
    rollout, student = setup(small_sd, **options, num_inference_steps=None, preserve=[])
    latents = torch.zeros(1, 8, 4, 16, 16)
    losses, traffic = on_meta(student, Contrastive(rollout, latents))
    assert traffic.readings == len(losses) == 2 and traffic.fetched == 0


def test_a_wait_would_be_seen(small_sd, on_meta, monkeypatch):
    rollout, student = setup(small_sd)
    monkeypatch.setattr(GuidedTarget, "loss", lambda self, prediction, batch: prediction.mean() * float(batch.eta.sum()))
    losses, traffic = on_meta(student, GuidedTarget(rollout))
    assert traffic.readings == len(losses) + 12
