"""The loops never wait for the device between two readings of the loss.

The meta device stands for a GPU. Its tensors hold nothing, so a host that reads from one (`.item()`, `if tensor`, a boolean
mask as an index, `nonzero`) fails by itself; copies to and from it are seen on their way.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import esd_kernels
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.options.erase import EraseConfig
from esd_peft.prompts import augmentation
from esd_peft.prompts.table import make_table
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.contrastive import ReferenceSamples, contrastive_loss
from esd_peft.training.learners import Denoiser
from esd_peft.training.loop import TrainingLoop
from esd_peft.training.method import Method
from esd_peft.training.monitor import Monitor
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import make_student
from esd_peft.training.trainer import Trainer
from families import draw_small, save_family
from runs import Run, method_of

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

    def train(run, method):
        with monkeypatch.context() as patch, Traffic() as traffic:
            patch.setattr(torch, "tensor", on_the_host)
            patch.setattr(torch.Tensor, "new_tensor", on_the_host)  # fails: it would be on the device
            trainer = Trainer(method, run.config.training, run.config.memory, run.rollout.profiler)
            loop = TrainingLoop(trainer, method.source, Monitor(run.student, run.rollout.profiler), None)
            for batch in loop.batches():
                trainer.step(batch)
        return trainer.losses, traffic

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(esd_kernels.guided_mse.__globals__["os"], "environ", {})
    return train


BY_METHOD = {
    "trajectories": {"trajectories": 3},
    "denoiser": {"rank": 2},
    "layers": {"rank": 2},
}
GUIDED = {
    "concept": [{"name": "circle", "map_to": "square"}, "red"],
    "preserve": ["a square"],
    "num_inference_steps": 3,
    "preservation_ratio": 0.25,
}


def setup(path, method, **options):
    """A run by that method, its student on the meta device."""
    given = {"train_batch_size": 4, "max_train_steps": 12, "method": method}
    if method != "contrastive":
        given |= GUIDED | BY_METHOD[method]
    family = open_family(str(path))
    config, prompts = resolve(EraseConfig(device="cpu", **(given | options)), family)
    embeds = {k: v.to(META) for k, v in family.encode(prompts.texts, torch.device("cpu"), torch.float32).items()}
    denoiser = family.load_denoiser(torch.float32).to(META)
    linear = [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear)]
    widths = {kind: layer.in_features for name, layer in linear if (kind := family.prompt_input(name))}
    projections = {kind: torch.empty(width, width, device=META) for kind, width in widths.items()}
    student = make_student(family, denoiser, config.student, META, torch.float32, projections=projections)
    rollout = Rollout(student, PhaseProfiler(META))
    return Run(config, prompts, family, make_table(prompts, embeds), student, rollout)


@pytest.mark.parametrize(
    "options",
    [{}, {"rollout": "student", "buffer_refresh_interval": 6}, {"adapter_type": "none"}, {"gradient_checkpointing": True}],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_the_host_reads_the_loss_and_nothing_else(small_sd, on_meta, options):
    run = setup(small_sd, "trajectories", **options)
    losses, traffic = on_meta(run, method_of(run))
    assert traffic.readings == len(losses) == 2  # after 10 and 12 steps
    refills = 2 if "rollout" in options else 1
    assert 0 < traffic.fetched <= refills * 4 * 3  # four tensors of each of three denoising steps


@pytest.fixture
def no_candidates(monkeypatch):
    """There is nothing to sort before training begins, which the host has to read."""
    monkeypatch.setattr(augmentation, "_nearest", lambda *_: [])


@pytest.mark.parametrize("options", [{}, {"unprompted_guidance": 2.0}, {"adapter_type": "none", "rank": None}], ids=str)
@pytest.mark.parametrize("method", ["layers", "denoiser"])
def test_so_it_is_where_the_teacher_is_asked_in_every_step(small_sd, on_meta, few, no_candidates, method, options):
    run = setup(small_sd, method, **options)
    made = method_of(run)
    losses, traffic = on_meta(run, made)
    assert traffic.readings == len(losses) == 2
    layers = len(made.learner.layers) if method == "layers" else 0
    assert traffic.fetched == 2 * 3 * (4 + layers)  # of the concepts' trajectories, and of the others'


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev", "pixart", "sana"])
def test_in_every_family(tmp_path, on_meta, monkeypatch, name):
    draw_small(monkeypatch)
    run = setup(save_family(name, tmp_path / "model"), "trajectories")
    losses, traffic = on_meta(run, method_of(run))
    assert traffic.readings == len(losses)


def test_contrastive_too(small_sd, on_meta):
    run = setup(small_sd, "contrastive", concept="circle")
    latents = torch.zeros(1, 8, 4, 16, 16)
    source = ReferenceSamples(run.rollout, run.table, latents, run.config.training.train_batch_size, torch.Generator())
    losses, traffic = on_meta(run, Method(Denoiser(run.student), source, contrastive_loss))
    assert traffic.readings == len(losses) == 2 and traffic.fetched == 0


@pytest.mark.parametrize("method", ["trajectories", "layers"])
def test_a_wait_would_be_seen(small_sd, on_meta, few, no_candidates, method):
    run = setup(small_sd, method)
    made = method_of(run)
    made.loss = lambda outputs, batch: next(iter(outputs.values())).mean() * float(batch.eta.sum())
    losses, traffic = on_meta(run, made)
    assert traffic.readings == len(losses) + 12
