"""Train a small pipeline of each kind on the shapes world, from the real classes of diffusers and transformers.

    python benchmarks/train_families.py --output DIR [--kinds sd3 flux ...]

writes DIR/KIND, a pipeline directory in diffusers' layout, and DIR/KIND.json (steps, loss, seconds, and in how many images
the classifier recognises what the prompt names). A kind whose KIND.json is there is not trained again, and a denoiser's
training that was stopped goes on from its last state. Text encoders other than the shapes pipeline's are first trained to
encode the labels of a prompt, and then frozen. The denoiser is trained as its own pipeline calls it,
through `ModelFamily.predict`. Transformers learn from what the shapes pipeline's UNet predicts of the same noisy latents,
in their own parameterization, at noise levels that it covers: that target has less variance than the noise itself. FLUX's is
then guidance-distilled, as FLUX.1 dev was (arXiv 2210.03142).
"""

import argparse
import copy
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from esd_peft.models import ModelFamily, open_family
from esd_peft.models.family import MASK, TOKENS, index_embeds
from esd_peft.models.flux import EMBEDDED_GUIDANCE
from esd_peft.options.model import PretrainedOptions
from esd_peft.worlds import WORLDS
from esd_peft.worlds.shapes import world
from small_families import KINDS, PROMPT_LENGTH
from world_quality import as_prompted
from world_training import Fit, LatentPool, mean_of_last

CPU = torch.device("cpu")
BATCH = 32
POOL = 16384  # images whose latents the denoisers learn from
MOST = 25.0  # times as much as at little noise
STEPS = {"encoder": 600, "v-prediction": 1500, "sdxl": 2000, "pixart": 8000, "guidance": 500}
STEPS_OF_TRANSFORMERS = 3000


def opened(path: Path) -> ModelFamily:
    """A pipeline of these, told that it draws images of the shapes world."""
    return open_family(str(path), options=PretrainedOptions(**drawing(path)))


def drawing(path: Path) -> dict[str, int]:
    """With which options it draws these."""
    return {"resolution": world.SIZE} | ({"max_sequence_length": PROMPT_LENGTH} if _reads_long(path) else {})


def _reads_long(path: Path) -> bool:
    return any("CLIP" not in file.read_text() for file in path.glob("text_encoder*/config.json"))


def captions() -> dict[str, dict[str, str]]:
    """Every caption that the world's images can have, "" first, and what each names."""
    rows = itertools.product(*((None, *names) for names in world.ATTRIBUTES.values()))
    named = [{kind: name for kind, name in zip(world.ATTRIBUTES, row, strict=True) if name} for row in rows]
    return {"": {}} | {world.prompt(labels, form): labels for labels in named if labels for form in world.TEMPLATES}


def teach_encoder(family: ModelFamily, steps: int, generator: torch.Generator) -> None:
    """The text encoder that is none of CLIP's learns to say, in the mean of its tokens, all that a prompt names."""
    pipe, captions_by_prompt = family.load_encoders(CPU, torch.float32), captions()
    part = next(name for name in family.text_parts if "CLIP" not in type(getattr(pipe, name)).__name__ and "encoder" in name)
    encoder, prompts = getattr(pipe, part).requires_grad_(True).train(), [*captions_by_prompt]
    names = {kind: [None, *names] for kind, names in world.ATTRIBUTES.items()}
    label_ids = torch.tensor(
        [[values.index(named.get(kind)) for kind, values in names.items()] for named in captions_by_prompt.values()]
    )

    def mean_token(rows: list[int]) -> Tensor:
        embeds = family.encode_prompts(pipe, [prompts[i] for i in rows], CPU)
        states = embeds[TOKENS][:, -PROMPT_LENGTH:]  # SD3 appends them to those of CLIP
        counts = embeds.get(MASK, torch.ones(states.shape[:2]))[..., None]
        return (states * counts).sum(1) / counts.sum(1)

    probes = nn.ModuleList(nn.Linear(mean_token([0]).shape[1], len(values)) for values in names.values())

    def loss_of() -> Tensor:
        rows = torch.randint(len(prompts), (BATCH,), generator=generator)
        token = mean_token(rows.tolist())
        losses = [cross_entropy(probe(token), right) for probe, right in zip(probes, label_ids[rows].T, strict=True)]
        return torch.stack(losses).mean()

    losses = [*Fit("encoder", nn.ModuleList([encoder, probes]), steps, 1e-3, generator).run(loss_of)]
    print(f"encoder: a cross-entropy of {mean_of_last(losses):.4f}")
    encoder.eval().save_pretrained(family.path / part)


def train_denoiser(
    name: str, family: ModelFamily, denoiser: ModelMixin, loss_of: Callable[[], Tensor], steps: int, lr: float, state: Path,
    generator: torch.Generator,
) -> float | None:  # fmt: skip
    """Minimise `loss_of()`; saves the moving average, which `denoiser` then is, too."""
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    losses = [*Fit(name, denoiser.requires_grad_(True).train(), steps, lr, generator, state, average=average).run(loss_of)]
    denoiser.load_state_dict(average.state_dict())
    average.save_pretrained(family.path / family.denoiser_part)
    return mean_of_last(losses)


class Lessons:
    """Training data of the denoiser of `family`: noisy latents and target predictions."""

    def __init__(self, family: ModelFamily, generator: torch.Generator, taught: bool) -> None:
        self.family, self.generator, self.vae = family, generator, family.load_part("vae")
        self.pool = LatentPool(self.vae, world.sample, generator, POOL)
        prompts = [*captions()]
        self.rows = {prompt: i for i, prompt in enumerate(prompts)}
        self.embeds = family.encode(prompts, CPU, torch.float32)
        self.teacher = open_family("shapes")
        self.taught = taught
        self.teacher_embeds = self.teacher.encode(prompts, CPU, torch.float32)
        self.unet = self.teacher.load_denoiser(torch.float32)

    def loss(self, denoiser: ModelMixin) -> Tensor:
        """The mean squared error of its predictions, each with its weight."""
        x_t, timesteps, target, rows, weight = self.draw()
        predictions = self.family.predict(denoiser, x_t, timesteps, index_embeds(self.embeds, rows))
        return ((predictions - target).square().flatten(1).mean(1) * weight).mean()

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents x_t, timesteps, the right predictions, the rows of the prompts, and the errors' weights `[B]`.

        For a transformer that predicts noise, errors are weighted as those of a flow: at high noise, where the content is
        decided, it has to learn what a U-Net's skip connections pass on.
        """
        labels, scaled = self.pool.sample(BATCH, self.generator)
        latents = self.family.denoiser_latents(self.vae, scaled / self.vae.config.scaling_factor)
        levels, noise = torch.rand(BATCH, generator=self.generator), torch.randn(latents.shape, generator=self.generator)
        schedule = self.family.noise_schedule
        if self.taught:
            levels = self._levels(2 * levels / (1 + levels))
        x_t, timesteps, target = schedule.add_noise(latents, noise, levels)
        rows = torch.tensor([self.rows[world.caption(label, self.generator)] for label in labels])
        signal, rest = schedule.shares(levels)
        weight = torch.ones(BATCH)
        if self.taught:
            target = self._taught(x_t, signal, rest, target, rows)
            if not schedule.is_flow_matching:
                weight = ((signal + rest) / signal).square().clamp(max=MOST)
        return x_t, timesteps, target, rows, weight

    def _levels(self, sigmas: Tensor) -> Tensor:
        """Return the levels at which x_t has noise `sigmas` and image 1 − σ.

        High noise, where the content is decided, is as frequent as for the schedulers of flow matching.
        """
        schedule = self.family.noise_schedule
        if schedule.is_flow_matching:
            return sigmas
        levels = torch.arange(1000) / 1000
        signal, rest = schedule.shares(levels)
        return levels[torch.searchsorted((rest / (signal + rest)).contiguous(), sigmas).clamp(max=999)]

    @torch.no_grad()
    def _taught(self, x_t: Tensor, signal: Tensor, rest: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        """Replace `target` by the prediction of the shapes pipeline's U-Net, where that covers the signal-to-noise ratio;
        both shares `[B]`.
        """
        alphas_cumprod = self.teacher.noise_schedule.alphas_cumprod()
        ratios = alphas_cumprod / (1 - alphas_cumprod)  # of signal to noise, falling
        ratio = (signal / rest).square()
        covered = (ratio <= ratios[0]) & (ratio >= ratios[-1])
        timesteps = torch.searchsorted(-ratios, -ratio).clamp(max=len(ratios) - 1)
        x, a, s = self.family.unpack_latents(x_t), signal.view(-1, 1, 1, 1), rest.view(-1, 1, 1, 1)
        alike = x / (a.square() + s.square()).sqrt()  # in the UNet's parameterization the squares add up to 1
        noise = self.teacher.predict(self.unet, alike, timesteps, index_embeds(self.teacher_embeds, rows))
        if self.family.noise_schedule.is_flow_matching:
            noise = noise - (x - s * noise) / a.clamp(min=1e-3)
        return torch.where(covered.view(-1, *[1] * (target.dim() - 1)), self.family.pack_latents(noise), target)


def train(kind: str, path: Path, steps: int) -> dict:
    """The pipeline of that kind, trained, in `path`; what its training was."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    if not path.is_dir():
        draft = path.with_name(f"{kind}.draft")
        KINDS[kind]().save_pretrained(draft)
        if _reads_long(draft):
            teach_encoder(opened(draft), STEPS["encoder"], generator)
        draft.rename(path)
    family = opened(path)
    lessons = Lessons(family, generator, taught=family.denoiser_part == "transformer")
    denoiser, embeds = family.load_denoiser(torch.float32), lessons.embeds

    state = path.with_suffix(".pt")
    record: dict = {"kind": kind, "steps": steps, "parameters": sum(p.numel() for p in denoiser.parameters())}
    record["loss"] = train_denoiser(kind, family, denoiser, lambda: lessons.loss(denoiser), steps, 1e-3, state, generator)
    if kind == "flux":
        teacher = copy.deepcopy(denoiser).eval().requires_grad_(False)

        def guided() -> Tensor:
            x_t, timesteps, _, rows, _ = lessons.draw()
            with torch.no_grad():
                null, towards = (
                    family.predict(teacher, x_t, timesteps, index_embeds(embeds, row)) for row in (0 * rows, rows)
                )
            target = family.guide(null, towards, EMBEDDED_GUIDANCE)
            return mse_loss(family.predict(denoiser, x_t, timesteps, index_embeds(embeds, rows)), target)

        record["guidance loss"] = train_denoiser(
            "guidance", family, denoiser, guided, STEPS["guidance"], 3e-4, state, generator
        )
    return record


def quality(path: Path) -> dict[str, float]:
    """Return the share of images of all full prompts whose labels the classifier recognises."""
    _, names, prompted = as_prompted(opened(path), WORLDS["shapes"], seeds=1)
    pairs = [*zip(names, prompted, strict=True)]
    return {kind: sum(seen[kind] == label[kind] for seen, label in pairs) / len(pairs) for kind in world.ATTRIBUTES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--steps", type=int, help="of each denoiser; left out: as many as each kind needs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds:
        record = args.output / f"{kind}.json"
        if record.exists():
            continue
        shutil.rmtree(args.output / f"{kind}.draft", ignore_errors=True)
        started = time.process_time()
        trained = train(kind, args.output / kind, args.steps or STEPS.get(kind, STEPS_OF_TRANSFORMERS))
        trained["drawing"] = drawing(args.output / kind)
        trained["denoiser_sha256"] = opened(args.output / kind).denoiser_hashes()
        trained["CPU seconds"] = round(time.process_time() - started)
        trained["recognised"] = quality(args.output / kind)
        record.write_text(json.dumps(trained, indent=1) + "\n")
        print(trained)


if __name__ == "__main__":
    main()
